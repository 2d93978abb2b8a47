# SPDX-License-Identifier: Apache-2.0
"""The machines that the contract suites run over, each as a pair of domains.

A kind is a context manager that yields a `Pair`. With XVD_CONTRACT=xen, in dom0 of a Xen host, the
only kind is real Xen, where one domain is both of the pair: it grants to itself, as dom0 does when
a disk is attached to it. What the suites reach through `host` is the emulated machine's alone.
"""

import asyncio
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import rig_xen
from rig_queue import NOTHING, SMALL
from rig_xen import ON_XEN, no_store

from xvd.machine.emulated.host import Host
from xvd.machine.emulated.limits import Limits
from xvd.machine.emulated.machine import EmulatedMachine
from xvd.machine.emulated.service import EmulatedHost, connect
from xvd.machine.xen.machine import XenMachine
from xvd.types import PAGE_SIZE, Domid

EACH = 16
LARGE_PAGES = "pages of 64 KiB"
GRANTER, MAPPER, OTHER = (Domid(0),) * 3 if ON_XEN else (Domid(1), Domid(0), Domid(2))


@dataclass
class Pair:
    """Two domains, and a way to get further connections to either of them or to a third."""

    granter: EmulatedMachine
    mapper: EmulatedMachine
    open: Callable[[Domid], EmulatedMachine]
    host: Host
    open_existing: Callable[[Domid], EmulatedMachine]
    opened: list[EmulatedMachine] = field(default_factory=list)

    def another(self, domid: Domid) -> EmulatedMachine:
        new = self.open(domid)
        self.opened.append(new)
        return new


@contextmanager
def one_process(limits: Limits = SMALL, page_size: int = PAGE_SIZE) -> Iterator[Pair]:
    host = Host(limits)
    for domid in (MAPPER, GRANTER, OTHER):
        host.create_domain(domid)

    def open_machine(domid: Domid) -> EmulatedMachine:
        return rig_xen.open_machine(host, domid, page_size)

    def open_existing(domid: Domid) -> EmulatedMachine:
        return EmulatedMachine(host.open(domid), no_store, page_size)

    pair = Pair(open_machine(GRANTER), open_machine(MAPPER), open_machine, host, open_existing)
    yield pair
    for each in [pair.granter, pair.mapper, *pair.opened]:
        each.close()
    assert host.accounting() == NOTHING
    host.close()


@contextmanager
def large_pages(limits: Limits = SMALL) -> Iterator[Pair]:
    """Two domains whose kernels have pages of 64 KiB: sixteen times the memory for as much."""
    more = replace(limits, pages=limits.pages * EACH, grefs=limits.grefs * EACH)
    with one_process(more, PAGE_SIZE * EACH) as pair:
        yield pair


class HostThread:
    """An emulated host that listens, with its event loop in a thread."""

    def __init__(self, limits: Limits = SMALL) -> None:
        self._where = tempfile.TemporaryDirectory(prefix="xvd")
        self.directory = Path(self._where.name)
        self._ready = threading.Event()
        self._limits = limits
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._thread.start()
        assert self._ready.wait(10)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        async with EmulatedHost(self._limits) as service:
            for domid in (GRANTER, OTHER):
                service.create_domain(domid)
            await service.listen(self.directory)
            self.service = service
            self.host = service.host
            self._ready.set()
            await self._stop.wait()

    def machine(self, domid: Domid) -> EmulatedMachine:
        return connect(self.directory, domid)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._where.cleanup()


def wait_for_accounting(host: Host, wanted: dict[str, int]) -> None:
    """The other side of a socket notices a close a little later."""
    for _ in range(100_000):
        if host.accounting() == wanted:
            return
        threading.Event().wait(0.0001)
    assert host.accounting() == wanted


@contextmanager
def across_a_socket(limits: Limits = SMALL) -> Iterator[Pair]:
    served = HostThread(limits)
    try:
        pair = Pair(
            served.machine(GRANTER), served.machine(MAPPER), served.machine, served.host,
            served.machine,
        )  # fmt: skip
        yield pair
        for each in [pair.granter, pair.mapper, *pair.opened]:
            each.close()
        wait_for_accounting(served.host, NOTHING)
    finally:
        served.close()


@contextmanager
def real_xen() -> Iterator[Pair]:
    def open_machine(domid: Domid) -> Any:
        return XenMachine(domid)

    no_host: Any = None
    pair = Pair(open_machine(GRANTER), open_machine(MAPPER), open_machine, no_host, open_machine)
    before = Path("/proc/self/maps").read_text().count("/dev/xen/")
    yield pair
    for each in [pair.granter, pair.mapper, *pair.opened]:
        each.close()
    assert Path("/proc/self/maps").read_text().count("/dev/xen/") == before


KINDS: dict[str, Callable[..., AbstractContextManager[Pair]]] = (
    {"real Xen": real_xen}
    if ON_XEN
    else {
        "one process": one_process,
        "across a socket": across_a_socket,
        LARGE_PAGES: large_pages,
    }
)
