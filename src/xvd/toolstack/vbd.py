# SPDX-License-Identifier: Apache-2.0
"""A disk's nodes as libxl writes them, waits for them, and removes them (libxl_disk.c).

Both directories are made in one transaction; what a backend or frontend writes afterwards is
theirs. The copy under /libxl is the toolstack's own memory: it never trusts the guest's directory.
"""

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from xvd.blkif.abi import XenbusState
from xvd.blkif.vdev import disk_name, format_vdev
from xvd.errors import ConfigError, PeerClosed, XenstoreError
from xvd.machine.xs import requests
from xvd.machine.xs.client import Transaction, XenstoreClient
from xvd.machine.xs.requests import Request
from xvd.types import DOM0, Domid

if TYPE_CHECKING:  # it knows every engine, and a list of disks needs none
    from xvd.toolstack.xldisk import XlDisk

INIT_TIMEOUT_S = 10.0
"""For the backend to reach state 2, and
on removal state 6: LIBXL_INIT_TIMEOUT and LIBXL_DESTROY_TIMEOUT (libxl_internal.h)."""

OPEN_TIMEOUT_S = 40.0
"""For storage that is still being opened then, as block-xvd has: LIBXL_HOTPLUG_TIMEOUT."""

BACKEND_KIND = "vbd"


@dataclass(frozen=True, slots=True)
class Vbd:
    """A disk that is attached, by its place in the store."""

    domid: Domid
    vdev: int
    backend_domid: Domid = DOM0
    kind: str = BACKEND_KIND

    @property
    def frontend(self) -> str:
        """The frontend's directory."""
        return f"/local/domain/{self.domid}/device/vbd/{self.vdev}"

    @property
    def backend(self) -> str:
        """The backend's directory."""
        return f"/local/domain/{self.backend_domid}/backend/{self.kind}/{self.domid}/{self.vdev}"

    @property
    def private(self) -> str:
        """The toolstack's own record."""
        return f"/libxl/{self.domid}/device/vbd/{self.vdev}"

    @property
    def name(self) -> str:
        """The disk's name for people: ``1/xvda``."""
        return disk_name(self.domid, str(self.vdev))


async def create_guest(store: XenstoreClient, domid: Domid, name: str) -> None:
    """Give a domain its place in the store, as libxl does when it builds one."""
    home = f"/local/domain/{domid}"
    await store.introduce(domid, 0, 1)  # type: ignore[arg-type]

    async def work(tx: Transaction) -> None:
        changes = [
            requests.mkdir(home),
            requests.set_perms(home, ["n0", f"r{domid}"]),
            requests.write(f"{home}/name", name),
            requests.write(f"{home}/domid", str(domid)),
            requests.mkdir(f"{home}/device/vbd"),
        ]
        for own in ("data", "error", "feature", "attr"):
            changes += _directory(f"{home}/{own}", [f"n{domid}"])
        await tx.ask_all(changes)

    await store.transact(work)


async def destroy_guest(store: XenstoreClient, domid: Domid) -> None:
    """Remove a domain's place in the store; its disks' backends see their frontends vanish."""
    await store.rm_each([f"/local/domain/{domid}", f"/libxl/{domid}"])
    await store.release(domid)


async def has_device_model(store: XenstoreClient, domid: Domid) -> bool:
    """Whether a QEMU has a guest's disks open as well, until the guest's own drivers come.

    libxl tells the domain's type. QEMU's own backend takes no lock for that reason.
    """
    with contextlib.suppress(XenstoreError):
        return await store.try_read(f"/libxl/{domid}/type") == "hvm"
    return False


def _backend_nodes(vbd: Vbd, disk: "XlDisk") -> dict[str, str]:
    nodes = {
        "frontend": vbd.frontend,
        "frontend-id": str(vbd.domid),
        "params": disk.params,
        "script": disk.script,
        "online": "1",
        "removable": str(int(disk.cdrom)),
        "bootable": "1",
        "state": str(int(XenbusState.INITIALISING)),
        "dev": format_vdev(vbd.vdev),
        "type": disk.backendtype,
        "mode": "w" if disk.writable else "r",
        "device-type": "cdrom" if disk.cdrom else "disk",
        "discard-enable": str(int(disk.discard)),
        "specification": "xen",
    }
    if disk.direct_io_safe:
        nodes["direct-io-safe"] = "1"
    return nodes


def _frontend_nodes(vbd: Vbd, disk: "XlDisk") -> dict[str, str]:
    return {
        "backend": vbd.backend,
        "backend-id": str(vbd.backend_domid),
        "state": str(int(XenbusState.INITIALISING)),
        "virtual-device": str(vbd.vdev),
        "device-type": "cdrom" if disk.cdrom else "disk",
        "trusted": str(int(disk.trusted)),
    }


def _directory(
    path: str, perms: list[str], nodes: Mapping[str, str] = MappingProxyType({})
) -> list[Request]:
    """Make a directory with these nodes; they have its permissions."""
    written = [requests.write(f"{path}/{name}", value) for name, value in nodes.items()]
    return [requests.mkdir(path), requests.set_perms(path, perms), *written]


async def add(store: XenstoreClient, domid: Domid, disk: "XlDisk", backend_domid: Domid) -> Vbd:
    """Make a disk's directories; `ConfigError` if the guest has such a disk already."""
    vbd = Vbd(domid, disk.number, backend_domid)
    back, front = [f"n{backend_domid}", f"r{domid}"], [f"n{domid}", f"r{backend_domid}"]

    async def work(tx: Transaction) -> None:
        if await tx.which_exist([vbd.frontend, vbd.backend]):
            raise ConfigError(f"{vbd.name} exists already; detach it first, or choose another vdev")
        await _open_to_driver_domain(tx, backend_domid)
        nodes = _backend_nodes(vbd, disk)
        await tx.ask_all(
            _directory(vbd.backend, back, nodes)
            + _directory(vbd.frontend, front, _frontend_nodes(vbd, disk))
            + _directory(vbd.private, ["n0"], nodes | {"backend": vbd.backend})
        )

    await store.transact(work)
    return vbd


async def _open_to_driver_domain(tx: Transaction, domid: Domid) -> None:
    """Give a driver domain what lies below ``backend``: it removes the nodes of closed disks."""
    home = f"/local/domain/{domid}/backend"
    if domid != DOM0 and not await tx.exists(home):
        await tx.mkdir(home)
        await tx.set_perms(home, [f"n{domid}"])


async def wait_for_state(
    store: XenstoreClient, path: str, wanted: Callable[[int], bool], timeout_s: float
) -> int:
    """The state of a device directory once `wanted` holds of it, 0 when it is gone.

    Raises TimeoutError.
    """
    async with asyncio.timeout(timeout_s):
        async with await store.watch(f"{path}/state") as watch:
            async for _ in watch:
                text = await store.try_read(f"{path}/state")
                state = int(text) if text and text.isdigit() else 0
                if wanted(state):
                    return state
    raise PeerClosed(f"{path}: the watch ended")


async def attach(
    store: XenstoreClient,
    domid: Domid,
    disk: "XlDisk",
    *,
    backend_domid: Domid = DOM0,
    timeout_s: float = INIT_TIMEOUT_S,
) -> Vbd:
    """Attach a disk and wait until a backend has taken it.

    Raises `ConfigError` if the guest or the disk is not as it should be, `PeerClosed` with the
    backend's own words if it fails or none answers; the nodes are removed then.
    """
    if not await store.exists(f"/local/domain/{domid}"):
        raise ConfigError(f"there is no guest {domid} on this host; see: xvd list")
    vbd = await add(store, domid, disk, backend_domid)
    try:
        offered = range(XenbusState.INIT_WAIT, XenbusState.CONNECTED + 1)
        answered = [*offered, XenbusState.CLOSING]
        await wait_for_state(store, vbd.backend, lambda s: s in answered, timeout_s)
        state = await _wait_for_storage(store, vbd)
    except TimeoutError:
        await remove_nodes(store, vbd)
        raise PeerClosed(
            f"{vbd.name}: no backend has taken the disk within {timeout_s:g} s; "
            f"start one in domain {backend_domid}: xvd backend"
        ) from None
    except asyncio.CancelledError:
        await remove_nodes(store, vbd)
        raise
    if state not in offered:
        reason = await backend_error(store, vbd)
        await remove_nodes(store, vbd)
        raise PeerClosed(f"{vbd.name}: {reason}")
    return vbd


async def _wait_for_storage(store: XenstoreClient, vbd: Vbd) -> int:
    """The backend's state once its storage is open, or cannot be. Raises PeerClosed."""
    try:
        async with asyncio.timeout(OPEN_TIMEOUT_S):
            async with await store.watch(f"{vbd.backend}/opening") as watch:
                async for _ in watch:
                    if not await store.exists(f"{vbd.backend}/opening"):
                        break
    except TimeoutError:
        await remove_nodes(store, vbd)
        raise PeerClosed(
            f"{vbd.name}: its storage could not be opened within {OPEN_TIMEOUT_S:g} s; see the"
            " backend's log"
        ) from None
    state = await store.try_read(f"{vbd.backend}/state")
    return int(state) if state and state.isdigit() else 0


async def backend_error(store: XenstoreClient, vbd: Vbd) -> str:
    """Return what the backend reported about a disk."""
    relative = vbd.backend.removeprefix(f"/local/domain/{vbd.backend_domid}/")
    path = f"/local/domain/{vbd.backend_domid}/error/{relative}/error"
    return await store.try_read(path) or "the backend refuses it and does not say why"


async def detach(
    store: XenstoreClient, vbd: Vbd, *, force: bool = False, timeout_s: float = INIT_TIMEOUT_S
) -> None:
    """Take a disk away: ask both ends to close, wait, remove the nodes.

    Raises `ConfigError` if there is none; `PeerClosed` if they do not close in time. With `force`
    the nodes are removed all the same, the frontend's first, so that the backend closes.
    """
    if not await store.exists(vbd.backend):
        raise ConfigError(f"{vbd.name}: there is no such disk; see: xvd list")

    async def work(tx: Transaction) -> None:
        await tx.write(f"{vbd.backend}/online", "0")
        if await tx.try_read(f"{vbd.backend}/state") != str(int(XenbusState.CLOSED)):
            await tx.write(f"{vbd.backend}/state", str(int(XenbusState.CLOSING)))

    await store.transact(work)
    closed = (XenbusState.UNKNOWN, XenbusState.CLOSED)
    try:
        await wait_for_state(store, vbd.backend, lambda s: s in closed, timeout_s)
    except TimeoutError:
        if not force:
            state = await store.try_read(f"{vbd.frontend}/state")
            raise PeerClosed(
                f"{vbd.name}: not closed after {timeout_s:g} s: the frontend stays in state "
                f"{state or 'unknown'}; unmount it there, or use --force"
            ) from None
        await store.rm_each([vbd.frontend])
        await _wait_until_closed(store, vbd, timeout_s)
    await remove_nodes(store, vbd)


async def _wait_until_closed(store: XenstoreClient, vbd: Vbd, timeout_s: float) -> None:
    """After force: give a living backend the time to close; a dead one will not."""
    closed = (XenbusState.UNKNOWN, XenbusState.CLOSED)
    try:
        await wait_for_state(store, vbd.backend, lambda s: s in closed, timeout_s)
    except TimeoutError:
        return


async def remove_nodes(store: XenstoreClient, vbd: Vbd) -> None:
    """Remove everything the toolstack wrote for a disk."""
    relative = vbd.backend.removeprefix(f"/local/domain/{vbd.backend_domid}/")
    error = f"/local/domain/{vbd.backend_domid}/error/{relative}"
    await store.rm_each([vbd.frontend, vbd.backend, vbd.private, error])


@dataclass(frozen=True, slots=True)
class Listed:
    """A row of the list: what is attached and how it stands."""

    vbd: Vbd
    target: str
    mode: str
    frontend_state: str
    backend_state: str


async def list_disks(store: XenstoreClient) -> list[Listed]:
    """List every disk of every guest, by the toolstack's own record."""
    found = []
    for domid in await _numbers(store, "/libxl"):
        for vdev in await _numbers(store, f"/libxl/{domid}/device/vbd"):
            record = f"/libxl/{domid}/device/vbd/{vdev}"
            backend = await store.try_read(f"{record}/backend") or ""
            parts = backend.split("/")
            backend_domid = Domid(int(parts[3])) if len(parts) > 5 else Domid(0)
            vbd = Vbd(Domid(domid), vdev, backend_domid)
            found.append(
                Listed(
                    vbd=vbd,
                    target=await store.try_read(f"{record}/params") or "",
                    mode=await store.try_read(f"{record}/mode") or "",
                    frontend_state=await store.try_read(f"{vbd.frontend}/state") or "0",
                    backend_state=await store.try_read(f"{vbd.backend}/state") or "0",
                )
            )
    return found


async def _numbers(store: XenstoreClient, path: str) -> list[int]:
    try:
        return sorted(int(name) for name in await store.ls(path) if name.isdigit())
    except XenstoreError as error:
        if error.code != "ENOENT":
            raise
        return []
