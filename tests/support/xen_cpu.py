# SPDX-License-Identifier: Apache-2.0
"""CPU times on a Xen host, exact to the microsecond and read without starting a process; both
matter, as in software emulation `xl list` alone costs as much as thousands of requests. And whether
this machine's clock can be believed: where an emulated CPU does not get a real one in time, Xen
calibrates its clock wrongly, and seconds become several times longer or shorter."""

import ctypes
import time
from collections.abc import Callable
from pathlib import Path


class Domain0:
    """Reads domain 0's CPU time from the hypervisor, through libxenstat."""

    def __init__(self) -> None:
        path, *_ = Path("/usr/lib").rglob("libxenstat.so.*")  # the library and links to it
        self._library = ctypes.CDLL(str(path))
        for name, result, arguments in (
            ("xenstat_init", ctypes.c_void_p, []),
            ("xenstat_get_node", ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_uint]),
            ("xenstat_free_node", None, [ctypes.c_void_p]),
            ("xenstat_node_domain", ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_uint]),
            ("xenstat_domain_cpu_ns", ctypes.c_ulonglong, [ctypes.c_void_p]),
        ):
            function = getattr(self._library, name)
            function.restype, function.argtypes = result, arguments
        self._handle = self._library.xenstat_init()
        assert self._handle, "libxenstat does not find the hypervisor"

    def cpu_ns(self) -> int:
        node = self._library.xenstat_get_node(self._handle, 0)
        assert node
        try:
            domain = self._library.xenstat_node_domain(node, 0)
            return int(self._library.xenstat_domain_cpu_ns(domain))
        finally:
            self._library.xenstat_free_node(node)


def process_ns(pid: int) -> int:
    """CPU time of a process, threads that have ended included (clock_getcpuclockid(3))."""
    return time.clock_gettime_ns(~pid << 3 | 2)


def kernel_threads(prefix: str) -> list[int]:
    """The processes whose names begin so: xen-blkback's threads are DOMID.DISK-QUEUE."""
    names = Path("/proc").glob("[0-9]*/comm")
    return [int(path.parent.name) for path in names if path.read_text().startswith(prefix)]


def qemu_of(domid: int) -> list[int]:
    """The QEMU that serves a domain's disks."""
    words = f"-xen-domid\0{domid}\0".encode()
    lines = Path("/proc").glob("[0-9]*/cmdline")
    return [int(path.parent.name) for path in lines if words in path.read_bytes()]


class OtherClock:
    """The clock of whoever serves a directory: by the times of a file that is written to.

    In a virtual machine that shares a directory with its host that is the host's, and right.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / "clock"

    def ns(self) -> int:
        self._path.write_bytes(b".")
        return self._path.stat().st_mtime_ns


class Meter:
    """What a stretch of time has cost dom0, and the processes that serve a disk of a domain.

    drift: how much faster our clock went than the other one, meanwhile; nothing of what was
    measured is right where that is far from 1.
    """

    def __init__(
        self, domain0: Domain0, other: OtherClock, serving: Callable[[], list[int]]
    ) -> None:
        self._domain0 = domain0
        self._other = other
        self._serving = serving
        self._pids: list[int] = []
        self._before = [0] * 4
        self.dom0_ns = self.back_ns = 0
        self.drift = 1.0

    def start(self) -> None:
        self._pids = self._serving()
        assert self._pids, "nobody serves it"
        self._before = self._now()

    def stop(self) -> None:
        pairs = zip(self._now(), self._before, strict=True)
        theirs, ours, self.dom0_ns, self.back_ns = (now - before for now, before in pairs)
        self.drift = ours / max(theirs, 1)

    def _now(self) -> list[int]:
        back = sum(process_ns(pid) for pid in self._pids)
        return [self._other.ns(), time.monotonic_ns(), self._domain0.cpu_ns(), back]
