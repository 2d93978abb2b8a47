# SPDX-License-Identifier: Apache-2.0
"""Real Xen in the place of the emulated machine, for the tests of queues and of whole disks.

With XVD_CONTRACT=xen, in dom0 of a Xen host, grants and event channels are those of the hypervisor.
dom0 is every domain then, and grants to itself, as it does when a disk is attached to it; the store
stays the emulated one. A test that needs what real Xen has not is skipped, where its marker says so
or where it asks for that, with the reason.
"""

import gc
import mmap
import os
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from xvd.machine.emulated.host import Host
from xvd.machine.emulated.limits import Limits
from xvd.machine.emulated.machine import EmulatedMachine
from xvd.machine.emulated.service import EmulatedHost
from xvd.machine.xen.claim import XenClaim
from xvd.machine.xen.evtchn import XenEventChannel
from xvd.machine.xen.gntalloc import XenSharedPages
from xvd.machine.xen.gntdev import XenForeignGrants
from xvd.machine.xen.machine import XenEventChannels, XenGrantTable, XenMachine
from xvd.machine.xs.client import XenstoreClient
from xvd.types import PAGE_SIZE, Domid, Port

ON_XEN = os.environ.get("XVD_CONTRACT") == "xen"
DOM0 = Domid(0)

BEYOND_XEN = {
    "accounting": "Xen keeps no accounting that a domain may read",
    "inject": "Xen fails when it fails",
    "third_domain": "needs a third domain",
    "unknown_domain": "Linux's devices say so when a grant or port is used, not before",
    "revoke": "gntalloc's grants last as long as the page",
    "lasting": "gntalloc's grants last as long as the page: none is taken, kept mapped or ended",
    "readonly_grants": "gntalloc's grants are writable",
    "grant_table": "a domain's grant table is its kernel's",
    "bound": "the evtchn device does not tell",
    "mapping": "gntdev may put an unmap off, so that single requests are copied",
    "limits": "the limits of a real host are large",
    "events": "the kernel hands an event on that came before the last one was acknowledged",
    "processes": "has a host of its own, in another thread",
    "speed": "takes longer in software emulation than a test may",
    "kernel_pages": "kernels have the pages that they have",
    "host": "nobody has the host's own tables",
    "end_of_dom0": "dom0 cannot be destroyed",
}
"""What the marker of this name says that a test uses and real Xen has not, and why."""

_VMA = re.compile(r"^(\w+)-(\w+) .* /dev/xen/(gntdev|gntalloc)$", re.MULTILINE)


def reason_of(what: str) -> str:
    """Why a test that uses something of `BEYOND_XEN` is skipped."""
    return f"beyond real Xen: {BEYOND_XEN[what]}"


def beyond(what: str) -> NoReturn:
    """Skip the test that gets here."""
    pytest.skip(reason_of(what))


class _Pages(XenSharedPages):
    def revoke(self, page: int) -> bool:
        beyond("revoke")

    def grant(self, page: int, *, readonly: bool = False) -> None:
        beyond("readonly_grants")


class _Grants(XenForeignGrants):
    unmaps_at_once = False
    """gntdev may put an unmap off, so single requests are copied."""

    def inject(self, statuses: list[int]) -> NoReturn:
        beyond("inject")


class _GrantTable(XenGrantTable):
    def share(self, peer: Domid, count: int) -> XenSharedPages:
        pages = _Pages(DOM0, count)
        self._made.add(pages)
        return pages

    def foreign(self, peer: Domid) -> XenForeignGrants:
        grants = _Grants(DOM0)
        self._made.add(grants)
        return grants


class _EventChannels(XenEventChannels):
    def alloc_unbound(self, peer: Domid) -> XenEventChannel:
        return super().alloc_unbound(DOM0)

    def bind_interdomain(self, peer: Domid, port: Port) -> XenEventChannel:
        return super().bind_interdomain(DOM0, port)


class XenDomain(XenMachine):
    """dom0 in the part of a domain; its store is the emulated one."""

    def __init__(self, domid: Domid, connect: Callable[[], Awaitable[XenstoreClient]]) -> None:
        super().__init__(domid)
        self.grants = _GrantTable(self._made)
        self.event_channels = _EventChannels(self._made)
        self._connect = connect

    def claim(self, vdev: int) -> XenClaim:
        """The domains' disks are dom0's, so they need different numbers."""
        return super().claim(vdev << 16 | self.domid)

    async def xenstore(self) -> XenstoreClient:
        return await self._connect()


class XenHost:
    """What tests ask of a host. Accounting is this process's, since the host was made."""

    def __init__(self, limits: Limits | None = None) -> None:
        gc.collect()  # what a test that failed has left
        self._before = _held()

    def create_domain(self, domid: Domid) -> None:
        """They are all there."""

    def accounting(self) -> dict[str, int]:
        now = _held()
        return {name: now[name] - self._before[name] for name in now}

    def close(self) -> None:
        """Nothing of the host's is ours."""

    def __getattr__(self, name: str) -> NoReturn:
        beyond("host")


def _held() -> dict[str, int]:
    """What the process has of Xen, by the words of the emulated host's accounting."""
    areas = _VMA.findall(Path("/proc/self/maps").read_text())
    pages = {"gntdev": 0, "gntalloc": 0}
    for begin, end, device in areas:
        pages[device] += (int(end, 16) - int(begin, 16)) // mmap.PAGESIZE
    opened = [os.readlink(f"/proc/self/fd/{fd}") for fd in _descriptors()]
    return {
        "sessions": 0,
        "pins": pages["gntdev"],
        "mappings": sum(device == "gntdev" for _, _, device in areas),
        "ports": opened.count("/dev/xen/evtchn"),
        "pages": pages["gntalloc"],
    }


def _descriptors() -> list[str]:
    """Without the one that reads the list."""
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")]


class XenHostService(EmulatedHost):
    """An emulated host whose domains have real grants and event channels."""

    def __init__(self, limits: Limits | None = None) -> None:
        super().__init__()
        self.host = XenHost()  # type: ignore[assignment]

    def machine(self, domid: Domid, page_size: int = PAGE_SIZE) -> Any:
        if page_size != PAGE_SIZE:
            beyond("kernel_pages")

        async def connect() -> XenstoreClient:
            return await XenstoreClient.from_socket(self.server.connect_local(domid))

        machine = XenDomain(domid, connect)
        self._machines.append(machine)  # type: ignore[arg-type]
        return machine

    def destroy_domain(self, domid: Domid) -> None:
        beyond("end_of_dom0")


HOST: type[Any] = XenHost if ON_XEN else Host
HOST_SERVICE: type[Any] = XenHostService if ON_XEN else EmulatedHost


def open_machine(host: Any, domid: Domid, page_size: int = PAGE_SIZE) -> Any:
    """A domain of a host of `HOST`, which has no store."""
    host.create_domain(domid)
    if ON_XEN:
        return XenDomain(domid, no_store)
    return EmulatedMachine(host.open(domid), no_store, page_size)


async def no_store() -> XenstoreClient:
    raise AssertionError("a queue needs no xenstore")
