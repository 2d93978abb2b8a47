# SPDX-License-Identifier: Apache-2.0
"""What qemu-img does for us with images that nobody has open."""

import shutil
import subprocess
from collections.abc import Sequence
from typing import Final

from xvd.engines.info import SnapshotAction
from xvd.errors import ConfigError

_SNAPSHOT_WORDS: Final = {
    SnapshotAction.CREATE: "-c", SnapshotAction.DELETE: "-d", SnapshotAction.REVERT: "-a",
}  # fmt: skip


def change_snapshot(path: str, action: SnapshotAction, name: str) -> None:
    """Create, delete or go back to a snapshot within a qcow2 image. Raises `ConfigError`, with what
    qemu-img says."""
    run_qemu_img(["snapshot", _SNAPSHOT_WORDS[action], name, path], f"{action} of {name}: {path}")


def run_qemu_img(words: Sequence[str], what: str) -> None:
    """Run it. what: what it is for, in words. Raises `ConfigError`, with what it says."""
    program = shutil.which("qemu-img")
    if program is None:
        raise ConfigError(f"qemu-img is not here ({what}); on Debian: apt-get install qemu-utils")
    done = subprocess.run(
        [program, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        umask=0o077,
    )  # fmt: skip
    if done.returncode:
        raise ConfigError(f"{what}: {done.stderr.strip().removeprefix('qemu-img: ')}")
