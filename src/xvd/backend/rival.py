# SPDX-License-Identifier: Apache-2.0
"""Who else would serve the disks of a kind on a real Xen host, now or from some moment on.

Two backends on one directory both answer the frontend and both write its state. Linux loads its own
by itself when a disk appears, so it may come long after we have begun.
"""

import contextlib
from pathlib import Path


def rival(kind: str, proc: Path = Path("/proc"), sys_dir: Path = Path("/sys")) -> str:
    """Name who serves ``backend/KIND`` beside us, and the remedy; empty if nobody does."""
    if kind == "vbd" and (sys_dir / "bus/xen-backend/drivers/vbd").exists():
        return "Linux's xen-blkback; unload it: modprobe -r xen-blkback, and blacklist it"
    if kind == "vbd3":
        for name in proc.glob("[0-9]*/comm"):
            with contextlib.suppress(OSError):
                if name.read_text() == "tapback\n":
                    return "blktap's tapback; stop it"
    return ""


def no_rival(_kind: str) -> str:
    """Name nobody: an emulated machine has no other backend."""
    return ""
