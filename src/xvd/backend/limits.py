# SPDX-License-Identifier: Apache-2.0
"""What the host lets this process keep for disks, as Linux and Xen count it."""

import contextlib
import os
import resource
import sys
from pathlib import Path
from typing import Final

from xvd.backend.budget import RESOURCES, SHARE, Amounts, Claim

DESCRIPTORS_MAX: Final = 65536
XEN_MAPTRACK: Final = 262144
"""Map-track entries of a domain: 1024 frames of 256, unless Xen was booted with others."""


def limits_of_host(maptrack: int = XEN_MAPTRACK, proc: Path = Path("/proc")) -> Amounts:
    """Return what this process may keep for disks: three quarters of what Linux and Xen allow it.

    Half of the memory that is available: the rest is for what is in flight, and for others.
    """
    descriptors = descriptor_limits()[1] * 3 // 4
    mappings = int((proc / "sys/vm/max_map_count").read_text()) * 3 // 4
    return Amounts(
        mappings=mappings - (proc / "self/maps").read_bytes().count(b"\n"),
        grants=maptrack * 3 // 4,
        memory=min(_available(proc), _allowed(proc)) // 2,
        descriptors=descriptors - len(os.listdir(proc / "self/fd")),
    )


def descriptor_limits() -> tuple[int, int]:
    """(how many files we may open, how many if we raise that as far as we may)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        hard = DESCRIPTORS_MAX
    return soft, max(soft, min(hard, DESCRIPTORS_MAX))


def _available(proc: Path) -> int:
    for line in (proc / "meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return sys.maxsize


def _allowed(proc: Path, cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes that the control group leaves, as a unit's MemoryMax= sets them."""
    with contextlib.suppress(OSError, ValueError):
        path = (proc / "self/cgroup").read_text().partition("0::/")[2].strip()
        group = cgroups / path
        most = int((group / "memory.max").read_text())  # "max" is no number: no limit
        return most - int((group / "memory.current").read_text())
    return sys.maxsize


def capacity(claim: Claim, limits: Amounts) -> dict[str, int]:
    """How many such disks each resource is enough for; those that come later get less."""
    fits = {name: max(0, limits.of(name)) // claim.need.of(name) for name in RESOURCES}
    return {name: max(0, count - SHARE + 1) for name, count in fits.items()}
