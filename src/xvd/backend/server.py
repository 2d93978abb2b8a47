# SPDX-License-Identifier: Apache-2.0
"""All disks of a backend domain: it watches the toolstack's paths and keeps a device for each."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final
from weakref import WeakValueDictionary

from xvd.backend.budget import Budget
from xvd.backend.device import Device, StorageOpener
from xvd.backend.disk import ServedDisk
from xvd.backend.groups import Groups
from xvd.backend.rival import no_rival
from xvd.backend.settings import Settings
from xvd.backend.sharing import SharedStorage
from xvd.backend.sizes import SizePoll
from xvd.backend.xentop import XentopPages
from xvd.blkif.abi import XenbusState
from xvd.blkif.handshake import BackendState
from xvd.blkif.vdev import disk_name
from xvd.errors import ConfigError, PeerClosed, XenstoreError
from xvd.loglimit import LogLimit, fields
from xvd.machine.interface import Machine
from xvd.machine.xs.client import Watch, XenstoreClient
from xvd.types import DOM0, Domid
from xvd.xenbus.directory import remove_device, report_error
from xvd.xenbus.runner import THREADS, Runtime
from xvd.xenbus.settings import Value

logger = logging.getLogger(__name__)

CLEAR_DELAY_S: Final = 0.5
"""How long a disk of a driver domain reads Closed before its nodes go."""

POLL_S: Final = 10.0
"""How often a disk's figures are logged, as in blkback, and its storage is asked for its size."""

POLLED_TOGETHER: Final = 30
RARITY_MAX: Final = 6.0
"""More disks than that are asked for their sizes more rarely, up to so many times. A poll takes a
microsecond for a disk in the CPU's caches. But where a hypervisor beneath has taken back the memory
that nobody had touched for ten seconds, waking up alone takes 30 ms (docs/benchmarks.md)."""

_GONE: Final = {"online": "0", "state": str(int(XenbusState.CLOSED))}


def rarity(disks: int) -> float:
    """Return by how much more rarely than every `POLL_S` so many disks are polled."""
    return min(max(1.0, disks / POLLED_TOGETHER), RARITY_MAX)


def settings_apart(
    settings: Settings, overrides: Mapping[str, Mapping[str, Value]]
) -> dict[str, Settings]:
    """Return the settings of each disk that has some of its own, by its name.

    Raises `ConfigError` where they do not go with what is set for all disks.
    """
    apart = {}
    for name, override in overrides.items():
        try:
            apart[name] = settings.changed(override)
        except ConfigError as error:
            raise ConfigError(f"{disk_name(*name.split('/', 1))}: {error}") from None
    return apart


class Server:
    """Serves every disk under ``backend/<kind>`` of this domain.

    guests: only those domains' disks; None: all. settings: for every disk; overrides:
    ``NAME=VALUE`` for the disk ``DOMID/VDEV``, before them; the guest may also be given by its
    name, as far as the store tells it to this domain. budget: what this host has for all of them.
    groups: limits that disks share. rival: who else serves a kind (`rival.rival`); a disk that such
    a one has found too is left to it. runtime: who runs their queues. pulse: when this is set, the
    sizes of storage are looked at; None: every ten seconds.

    Raises `ConfigError` for overrides that do not go with the settings.

    One store connection for all, no polling. A device that fails costs itself only.
    """

    def __init__(
        self,
        machine: Machine,
        store: XenstoreClient,
        open_storage: StorageOpener,
        *,
        kinds: Sequence[str] = ("vbd",),
        guests: Sequence[int] | None = None,
        settings: Settings | None = None,
        overrides: Mapping[str, Sequence[str]] | None = None,
        budget: Budget | None = None,
        groups: Groups | None = None,
        rival: Callable[[str], str] = no_rival,
        runtime: Runtime = THREADS,
        pulse: asyncio.Event | None = None,
    ) -> None:
        self.devices: dict[str, Device] = {}
        self._machine = machine
        self._store = store
        self._open_storage = SharedStorage(open_storage, store)
        self.kinds = kinds
        self._guests = guests
        self._settings = settings or Settings()
        self._budget = budget or Budget()
        self._groups = groups or Groups()
        self._rival = rival
        self._runtime = runtime
        self._pulse = pulse
        self._overrides = {name: Settings.parse(t) for name, t in (overrides or {}).items()}
        settings_apart(self._settings, self._overrides)
        self._names: dict[str, str] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._again: set[asyncio.Task[None]] = set()
        self._figures = asyncio.Event()
        self._note_figures()
        self._closing = False
        self._watches: list[Watch] = []
        self._followers: list[asyncio.Task[None]] = []
        self._pollers: list[asyncio.Task[None]] = []
        self._looks: list[asyncio.Event] = []
        self._left: set[str] = set()
        self._pages = XentopPages(store)
        self._log_limits: WeakValueDictionary[str, LogLimit] = WeakValueDictionary()

    async def start(self) -> None:
        """Watch, and serve what is assigned already."""
        for each in [None] if self._guests is None else self._guests:
            await self.serve_guest(each)
        polls = (self._log_figures(), self._poll_sizes())
        self._pollers = [asyncio.create_task(poll) for poll in polls]

    async def serve_guest(self, guest: int | None) -> None:
        """Serve the disks of this domain too; None: of every domain."""
        for kind in self.kinds:
            watch = await self._store.watch(
                f"backend/{kind}" + ("" if guest is None else f"/{guest}")
            )
            self._watches.append(watch)
            looked = asyncio.Event()
            self._looks.append(looked)
            self._followers.append(asyncio.create_task(self._follow(kind, watch, looked)))

    async def settle(self, patience_s: float) -> None:
        """Wait until each disk that was there at the start has its storage, or an error; no longer
        than that, as storage may hang."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                for looked in self._looks:
                    await looked.wait()
                for device in list(self.devices.values()):
                    await device.tried.wait()

    async def wait(self) -> None:
        """Return when the store is lost."""
        await asyncio.gather(*self._followers)

    async def _log_figures(self) -> None:
        while True:
            await self._figures.wait()
            await asyncio.sleep(POLL_S)
            for device in self.devices.values():
                device.disk.log_figures()

    def _note_figures(self) -> None:
        """Wake up for figures only while some disk's are wanted."""
        wanted = [self._settings.log_stats, *(o.get("log_stats") for o in self._overrides.values())]
        if any(wanted):
            self._figures.set()
        else:
            self._figures.clear()

    async def _poll_sizes(self) -> None:
        sizes: SizePoll[ServedDisk] = SizePoll(self._runtime)
        while True:
            await self._beat()
            for disk in await sizes.poll([device.disk for device in self.devices.values()]):
                following = asyncio.ensure_future(disk.follow_size())  # it may hang
                self._again.add(following)
                following.add_done_callback(self._again.discard)

    async def _beat(self) -> None:
        """Wait until sizes are to be looked at again."""
        if self._pulse is None:
            await asyncio.sleep(POLL_S * rarity(len(self.devices)))
        else:
            await self._pulse.wait()
            self._pulse.clear()

    def device(self, name: str) -> Device:
        """The disk with the directory `name`, or with ``DOMID/VDEV`` at its end; `ConfigError`."""
        found = [d for path, d in self.devices.items() if f"/{path}".endswith(f"/{name}")]
        if len(found) != 1:
            known = ", ".join(sorted(d.name for d in self.devices.values())) or "none"
            raise ConfigError(f"{name!r} names no disk that is served here; there are: {known}")
        return found[0]

    def guest_name(self, path: str) -> str:
        """Return the name of the guest of this directory; empty if the store has not told it."""
        return self._names.get(path.split("/")[2], "")

    def settings_of(self, path: str) -> Settings:
        """Return the settings of the disk with this directory."""
        domid, vdev = f"/{path}".split("/")[-2:]
        values: dict[str, Value] = {}
        for guest in (self._names.get(domid), domid):
            values |= self._overrides.get(f"{guest}/{vdev}", {})
        return self._settings.changed(values)

    def change(self, texts: Sequence[str], disk: str = "") -> dict[str, Any]:
        """Set each ``NAME=VALUE``, for all disks or only for ``DOMID/VDEV``; what holds then.

        A disk keeps what was set for it alone. Raises `ConfigError`, and then nothing is changed.
        """
        values = Settings.parse(texts)
        self._groups.check(str(values.get("group_name") or ""))
        settings, overrides = self._settings, dict(self._overrides)
        if disk:
            overrides[disk] = overrides.get(disk, {}) | values
        else:
            settings = settings.changed(values)
        apart = settings_apart(settings, overrides)
        self._settings, self._overrides = settings, overrides
        self._apply()
        return apart.get(disk, settings).values()

    def replace(
        self,
        texts: Sequence[str],
        overrides: Mapping[str, Sequence[str]],
        groups: Mapping[str, Sequence[str]],
    ) -> None:
        """Go by each ``NAME=VALUE`` from now on: what was set before is forgotten.

        texts: for every disk; the others as this was made with. Raises `ConfigError`, and then
        nothing is changed.
        """
        usual = Settings(copying=self._settings.copying, state_dir=self._settings.state_dir)
        settings = usual.changed(Settings.parse(texts))
        parsed = {name: Settings.parse(each) for name, each in overrides.items()}
        for each in (settings, *settings_apart(settings, parsed).values()):
            self._groups.check(each.group_name)
        self._groups.replace(groups)
        self._settings, self._overrides = settings, parsed
        self._apply()

    def _apply(self) -> None:
        """Let every disk go by what is set for it now."""
        self._note_figures()
        for path, device in self.devices.items():
            device.disk.apply(self.settings_of(path))

    def change_group(self, name: str, texts: Sequence[str]) -> dict[str, Any]:
        """Set each ``NAME=VALUE`` of a group's limits; the limits and disks of every group then.

        No name changes nothing. Raises `ConfigError`, and then nothing is changed either.
        """
        if name:
            self._groups.change(name, texts)
        members: dict[str, list[str]] = {group: [] for group in self._groups.limits()}
        for device in self.devices.values():
            settings = device.disk.settings
            if settings.group_name:
                members[settings.group_name].append(device.name)
            if name and settings.group_name == name:
                device.disk.apply(settings)
        limits = self._groups.limits()
        return {
            group: {"limits": limits[group], "disks": sorted(disks)}
            for group, disks in members.items()
            if limits[group] or disks
        }

    def squeeze(self) -> None:
        """Memory is short: every disk gives back what it keeps and does not use."""
        for device in self.devices.values():
            device.disk.squeeze()

    async def close(self) -> None:
        """Drain and release every disk, leaving its nodes for whoever serves it next."""
        self._closing = True
        tasks = [*self._followers, *self._again, *self._pollers]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for watch in self._watches:
            with contextlib.suppress(PeerClosed, XenstoreError):
                await watch.close()
        await asyncio.gather(*(device.stop() for device in list(self.devices.values())))
        await asyncio.gather(*self._running.values(), return_exceptions=True)
        self._pages.close()

    async def _follow(self, kind: str, watch: Watch, looked: asyncio.Event) -> None:
        """A path names the disk that changed; anything shorter means all of them. looked: is set
        when the first event, which comes at once, has been heeded."""
        with contextlib.suppress(PeerClosed):
            async for path in watch:
                parts = path.removeprefix(f"backend/{kind}").strip("/").split("/")
                if len(parts) >= 2:
                    await self._consider(f"backend/{kind}/{parts[0]}/{parts[1]}")
                else:
                    await self._scan(f"backend/{kind}", parts[0])
                looked.set()

    async def _scan(self, path: str, guest: str) -> None:
        """Consider every disk of a guest, or of all of them."""
        for domid in [guest] if guest else await self._children(path):
            for vdev in await self._children(f"{path}/{domid}"):
                await self._consider(f"{path}/{domid}/{vdev}")

    async def _children(self, path: str) -> list[str]:
        try:
            return await self._store.ls(path)
        except XenstoreError:
            return []

    async def _consider(self, path: str) -> None:
        """Begin to serve a directory that the toolstack has completed and nobody serves yet."""
        if path in self._running:
            return
        if await self._store.try_read(f"{path}/frontend") is None:
            self._left.discard(path)
            return
        await self._note_name(path.split("/")[2])
        if await self._is_over(path) or path in self._running or self._closing:
            return
        kind = path.split("/")[1]
        if other := self._rival(kind):
            await self._leave(path, f"left to {other}; then attach the disk again")
            return
        try:
            settings = self.settings_of(path)
        except ConfigError as error:  # what is set for its guest's name does not go with its own
            await self._leave(path, f"{error}; set it right, then attach the disk again")
            return
        device = Device(
            self._machine,
            self._store,
            path,
            self._open_storage,
            settings,
            budget=self._budget,
            groups=self._groups,
            log_limit=self._log_limit(path),
            rival=lambda: self._rival(kind),
            runtime=self._runtime,
        )
        self.devices[path] = device
        task = asyncio.create_task(self._serve(device))
        self._running[path] = task
        task.add_done_callback(lambda _: self._ended(path))

    async def _note_name(self, domid: str) -> None:
        """Remember what a guest is called, if a disk's settings may be under its name."""
        (name,) = await self._store.try_read_each([f"/local/domain/{domid}/name"])
        if isinstance(name, str):  # a driver domain may not be allowed to read it
            self._names[domid] = name

    def _log_limit(self, path: str) -> LogLimit:
        """The one for all disks of the guest in ``backend/KIND/DOMID/VDEV``, while it has any."""
        name = path.split("/")[2]
        limit = self._log_limits.get(name)
        if limit is None:
            limit = LogLimit(Domid(int(name)) if name.isdigit() else None)
            self._log_limits[name] = limit
        return limit

    async def _leave(self, path: str, text: str) -> None:
        """Do not serve a disk, and say why once."""
        if path in self._left:
            return
        self._left.add(path)
        name = disk_name(path.split("/")[2], path)
        about = fields(path.split("/")[2], name.partition("/")[2], "failed")
        logger.error("%s: %s", path, text, extra=about)
        await report_error(self._store, path, text)

    async def _serve(self, device: Device) -> None:
        with contextlib.suppress(PeerClosed, XenstoreError):
            await self._pages.add(device.path, device.disk.counters)
        try:
            await device.run()
        finally:
            self._pages.remove(device.path)
        if device.state is BackendState.GONE and self._machine.domid != DOM0:
            await self._clear(device.path)

    async def _clear(self, path: str) -> None:
        """In a driver domain nobody else removes a disk's nodes, and the toolstack waits for it.

        Not at once: a toolstack that finds them gone before it has seen Closed fails.
        """
        await asyncio.sleep(CLEAR_DELAY_S)
        with contextlib.suppress(PeerClosed, XenstoreError):
            await remove_device(self._store, path, _GONE)

    async def _is_over(self, path: str) -> bool:
        """Whether the disk was closed for good, and the toolstack is about to remove its nodes."""
        nodes = {name: await self._store.try_read(f"{path}/{name}") for name in _GONE}
        return nodes == _GONE

    async def _consider_again(self, path: str) -> None:
        """The toolstack may have assigned a new disk there while the old one was being closed."""
        with contextlib.suppress(PeerClosed, XenstoreError):
            await self._consider(path)

    def _ended(self, path: str) -> None:
        task = self._running.pop(path)
        self.devices.pop(path, None)
        domid = path.split("/")[2]
        if not any(other.split("/")[2] == domid for other in self.devices):
            self._names.pop(domid, None)
        if not self._closing:
            again = asyncio.ensure_future(self._consider_again(path))
            self._again.add(again)
            again.add_done_callback(self._again.discard)
        if not task.cancelled() and task.exception() is not None:
            name = disk_name(domid, path)
            text = "%s: %r; this disk is not served any more"
            about = fields(domid, name.partition("/")[2], "failed")
            logger.error(text, name, task.exception(), extra=about)
