# SPDX-License-Identifier: Apache-2.0
"""One disk's backend: it acts out what blkif/handshake.py says.

An actor: watches and finished work put events into one queue, one task takes them out, one at a
time. Nothing negotiated survives a disconnect: every connect reads every node again.
"""

import asyncio
import contextlib
import errno
import logging
import os
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import replace
from typing import Any, TypeVar

from xvd.backend.budget import AGREED, LIVE, NEGOTIABLE, Budget, Claim, Lease
from xvd.backend.connection import Connection, Plan
from xvd.backend.counters import merge_counters, without_now
from xvd.backend.features import (
    agreed_unit,
    claim_of,
    features_of,
    promised,
    within,
    without,
)
from xvd.backend.inbox import Inbox
from xvd.backend.settings import Settings
from xvd.blkif.abi import Abi, XenbusState
from xvd.blkif.handshake import (
    BackendAction,
    BackendEvent,
    BackendState,
    BackendStep,
    backend_step,
    frontend_event,
    initial_backend,
    removal_event,
)
from xvd.blkif.nodes import (
    NODES,
    BackendAssignment,
    BackendFeatures,
    FrontendConfig,
    NodeChanges,
    Side,
    format_backend,
    format_offer,
    format_size,
    parse_backend_assignment,
    parse_frontend,
    parse_state,
    stale_frontend_nodes,
)
from xvd.blkif.vdev import disk_name
from xvd.engines.interface import Engine
from xvd.errors import (
    BudgetError,
    ConfigError,
    PeerClosed,
    PeerProtocolError,
    XenstoreError,
    XvdError,
)
from xvd.machine.interface import Machine
from xvd.machine.xs.client import Watch, XenstoreClient
from xvd.machine.xs.pace import Pace
from xvd.machine.xs.xenbus import change_device, read_directory, report_error
from xvd.types import RING_SECTOR_SIZE

_T = TypeVar("_T")
StorageOpener = Callable[[BackendAssignment], Awaitable[Engine]]


def _own_node(name: str) -> bool:
    return (Side.BACKEND, name) in NODES


def _frontends_node(name: str) -> bool:
    return (Side.FRONTEND, name) in NODES or bool(stale_frontend_nodes([name]))


class _DeviceLog(logging.LoggerAdapter[logging.Logger]):
    """Begins each line with the disk's name."""

    def process(
        self, msg: object, kwargs: MutableMapping[str, Any]
    ) -> tuple[str, MutableMapping[str, Any]]:
        """Put the name first."""
        return f"{self.extra['device'] if self.extra else ''}: {msg}", kwargs


class Device:
    """One disk of this backend domain; `run` returns when it is gone or `stop` has ended it.

    path: its directory, relative to this domain (``backend/vbd/1/51712``). budget: what this host
    has for it and others; without end if there is none.
    """

    def __init__(
        self,
        machine: Machine,
        store: XenstoreClient,
        path: str,
        open_storage: StorageOpener,
        settings: Settings | None = None,
        *,
        budget: Budget | None = None,
    ) -> None:
        self.path = path
        self.name = disk_name(path.split("/")[-2], path)
        self.state = BackendState.STARTING
        self.assignment: BackendAssignment | None = None
        self.engine: Engine | None = None
        self.connection: Connection | None = None
        self.features: BackendFeatures | None = None
        self._machine = machine
        self._store = store
        self._open_storage = open_storage
        self._settings = settings or Settings()
        self._budget = budget or Budget()
        self._log = _DeviceLog(logging.getLogger(__name__), {"device": self.name})
        self._events = Inbox()
        self._sizing = asyncio.Lock()  # one look at the size, or change of it, at a time
        self._storage = threading.Lock()  # one thread that measures, resizes or closes it
        self._opening: asyncio.Task[None] | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._released: asyncio.Event = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._error = ""
        self._written: XenbusState | None = None
        self._broken = False
        self._failures = 0
        self.totals: dict[str, object] = {}

    # ---- The actor ----

    async def run(self) -> None:
        """Serve the disk until the toolstack removes it, or `stop`."""
        watches: list[Watch] = []
        try:
            nodes = await read_directory(self._store, self.path, _own_node)
            self.assignment = parse_backend_assignment(nodes)
            self._written = own = parse_state(Side.BACKEND, nodes.get("state"))
            self.state = initial_backend(own, await self._frontend_state()).state
            for path in (f"{self.assignment.frontend}/state", self.path):
                watches.append(await self._store.watch(path))
                self._spawn(self._follow(watches[-1]))
            self._opening = asyncio.ensure_future(self._open())
            while self.state is not BackendState.GONE:
                event = await self._events.get()
                if event is None:
                    break
                await self._feed(event)
        except XvdError as error:
            await self._report_unless_removed(error)
        finally:
            await self._end(watches)

    async def _report_unless_removed(self, error: XvdError) -> None:
        """What goes wrong because the toolstack is removing the nodes is no error."""
        with contextlib.suppress(XvdError):
            if not await self._store.exists(f"{self.path}/frontend"):
                self._log.info("removed: %s", error)
                return
            await report_error(self._store, self.path, str(error))
        self._log.error("%s; this disk is not served", error)

    async def stop(self) -> None:
        """Finish what is in flight, unmap, and leave the nodes as they are.

        The frontend's ring stays live: whoever serves this directory next attaches to it.
        """
        await self._disconnect()
        self._events.put(None)

    async def _end(self, watches: list[Watch]) -> None:
        await self._disconnect()
        for watch in watches:
            with contextlib.suppress(XvdError):
                await watch.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._opening is not None:
            # Not cancelled: what it opens would be nobody's, and stay open and locked.
            await self._opening
        if self.engine is not None:
            async with self._sizing:
                engine, self.engine = self.engine, None
                await self._with_storage(engine.close)

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def put(self, event: BackendEvent) -> None:
        """Tell the device something, from the event loop's thread."""
        self._events.put(event)

    async def _feed(self, event: BackendEvent) -> None:
        step = backend_step(self.state, event)
        if step.state is not self.state:
            self._log.debug("%s: %s -> %s", event.name, self.state.name, step.state.name)
        self.state = step.state
        await self._act(step)

    async def _act(self, step: BackendStep) -> None:
        """Do a step's actions in order; the state goes with the nodes of one, or before all."""
        if not any(action in _NODES for action in step.actions):
            await self._write(NodeChanges({}))
        for action in step.actions:
            await getattr(self, f"_do_{action.name.lower()}")()

    async def _write(self, changes: NodeChanges, *, always: bool = False) -> None:
        state = self.state.xenbus
        if state == self._written and not always:
            state = None
        if state is None and not changes.write and not changes.remove:
            return
        there = await change_device(
            self._store,
            self.path,
            state=state,
            write=changes.write,
            remove=changes.remove,
            not_in=self._foreign_state(),
        )
        if there and state is not None:
            self._written = state

    # ---- Looking ----

    async def _follow(self, watch: Watch) -> None:
        pace = Pace()
        try:
            async for _ in watch:
                if wait_s := pace.wait_s():
                    await asyncio.sleep(wait_s)
                watch.skip()
                try:
                    await self._do_look()
                except XenstoreError as error:  # this look is lost; the next event is another
                    self._log.error("its nodes could not be read: %s", error)
        except PeerClosed:
            self._events.put(None)  # no store, no toolstack: nobody to serve for

    async def _frontend_state(self) -> XenbusState:
        assert self.assignment is not None
        try:
            text = await self._store.try_read(f"{self.assignment.frontend}/state")
            return parse_state(Side.FRONTEND, text)
        except (PeerProtocolError, XenstoreError):
            return XenbusState.UNKNOWN

    def _foreign_state(self) -> XenbusState | None:
        """Once we have written our state, Initialising is that of a new disk of the same name.

        The toolstack removes the nodes of a disk that reads Closed, and may add them anew, while
        we are on our way from there to another state.
        """
        begun = self._written not in (None, XenbusState.UNKNOWN, XenbusState.INITIALISING)
        return XenbusState.INITIALISING if begun else None

    async def _do_look(self) -> None:
        own = await self._store.try_read(f"{self.path}/state")
        foreign = self._foreign_state()
        if foreign is not None and own == str(int(foreign)):
            self._events.put(None)
            return
        frontend = await self._frontend_state()
        online = await self._store.try_read(f"{self.path}/online")
        if online is None or online.strip("\0 \n") == "0":
            self.put(removal_event(frontend))
        self.put(frontend_event(frontend))

    # ---- Storage ----

    async def _open(self) -> None:
        assert self.assignment is not None
        try:
            self.engine = await self._open_storage(self.assignment)
        except (OSError, XvdError) as error:
            self._error = f"cannot open {self.assignment.image!r}: {error}"
            self._log.error("%s", self._error)
            self.put(BackendEvent.STORAGE_FAILED)
            return
        self.features = features_of(self.engine, self.assignment, self._settings)
        self.put(BackendEvent.STORAGE_READY)

    # ---- Actions ----

    async def _do_offer(self) -> None:
        assert self.engine is not None
        assert self.assignment is not None
        # Anew for each frontend: what was promised to the last one, or withdrawn, ends with it.
        self.features = self._affordable(features_of(self.engine, self.assignment, self._settings))
        await self._write(format_offer(self.features))

    def _affordable(self, features: BackendFeatures) -> BackendFeatures:
        """What of it this host has room for now; all of it if not even the least can be had, and
        then the connection is refused, unless there is room by then."""
        wanted = claim_of(features, self._settings)
        try:
            claim = self._budget.fit(wanted, NEGOTIABLE)
        except BudgetError:
            return features
        self._say_less(wanted, claim)
        return within(features, claim)

    def _say_less(self, wanted: Claim, claim: Claim) -> None:
        if claim != wanted:
            self._log.info("this host has no room for all: %s", claim.instead_of(wanted))

    async def _do_publish(self) -> None:
        assert self.features is not None
        await self._write(format_backend(self.features))

    async def _do_publish_size(self) -> None:
        assert self.features is not None
        await self._write(format_size(self.features.sectors, self.features.unit), always=True)

    async def _do_report_error(self) -> None:
        # The reason first: the toolstack that sees the state looks for it at once.
        await report_error(self._store, self.path, self._error or "the disk failed")
        await self._write(NodeChanges({}))

    async def _do_connect(self) -> None:
        self._start_connecting(resume=False)

    async def _do_reconnect(self) -> None:
        self._start_connecting(resume=True)

    def _start_connecting(self, *, resume: bool) -> None:
        self._connecting = asyncio.ensure_future(self._connect(resume))

    async def _connect(self, resume: bool) -> None:
        assert self.assignment is not None
        assert self.engine is not None
        assert self.features is not None
        try:
            published = None
            if resume:
                own = await read_directory(self._store, self.path, _own_node)
                self.features = promised(self.features, own)
                published = own.get("sectors")
            nodes = await read_directory(self._store, self.assignment.frontend, _frontends_node)
            config = parse_frontend(
                nodes,
                host_abi=Abi.native(),
                max_ring_page_order=self.features.max_ring_page_order,
                max_queues=self.features.max_queues,
            )
            unit = agreed_unit(config, self.features, self._settings)
            self.features = replace(self.features, unit=unit)
            grown = resume and published != str(self.features.sectors // unit)
            self._released.clear()
            self._broken = False
            self._failures = 0
            lease = self._take_room(config)
            plan = Plan(
                self._machine,
                self.assignment.frontend_domid,
                config,
                self.features,
                self.engine,
                self._settings.within(lease.claim),
                lease,
                resume=resume,
            )
            name = f"xvd-{self.assignment.frontend_domid}-{self.assignment.name}"
            self.connection = Connection(plan, name)
            self.connection.start(self._threads_ended)
        except Exception as error:  # a mistake of ours too is to cost this disk only, and be told
            if self.connection is not None:
                self.connection.release()
                self.connection = None
            self._error = f"cannot connect to {self.assignment.frontend}: {error}"
            ours = not isinstance(error, XvdError | OSError)
            self._log.error("%s", self._error, exc_info=ours)
            self.put(BackendEvent.CONNECT_FAILED)
            return
        if resume:
            self.connection.kick()
        self.connection.listen(self._alarmed)
        layout = f"queues: {len(config.queues)}, ring pages: {config.ring_pages}"
        self._log.info("connected (%s, %s, %s)", config.abi.protocol, self.mode, layout)
        self.put(BackendEvent.CONNECT_DONE)
        if grown:
            self.put(BackendEvent.RESIZED)  # while nobody served it; the state has to be repeated

    def _take_room(self, config: FrontendConfig) -> Lease:
        """Take what a connection keeps, or less of it; `BudgetError` says what there is none of."""
        assert self.features is not None
        wanted = claim_of(self.features, self._settings, config)
        lease = self._budget.take(wanted, AGREED)
        self._say_less(wanted, lease.claim)
        return lease

    @property
    def mode(self) -> str:
        """How data is moved: "grant copy", "mapping" (for each request) or "persistent grants"."""
        if self.connection is None:
            return "grant copy" if self._settings.copying else "mapping"
        return self.connection.mode

    def _threads_ended(self, failure: Exception | None) -> None:
        """The queues are drained, or a ring is broken: give everything back at once."""
        assert self.connection is not None
        connection, self.connection = self.connection, None
        connection.mute()
        self._broken = connection.broken
        self.totals = merge_counters(self.totals, without_now(connection.counters()))
        connection.release()
        self._released.set()
        if self._broken or failure is not None:
            self._error = str(failure or "the frontend broke the ring: indices out of bounds")
            self._log.error("%s", self._error)
            self.put(BackendEvent.RING_BROKEN)

    def _alarmed(self) -> None:
        """The storage failed, or cannot do something: the queue's thread rang."""
        assert self.connection is not None
        assert self.features is not None
        connection = self.connection
        number, failures = connection.failure()
        features = without(self.features, connection.withdrawn())
        if features != self.features:
            self._log.info("the storage cannot do what it was thought to: offered no more")
            self.features = features
            self.put(BackendEvent.WITHDRAWN)
        if failures > self._failures:
            self._failures = failures
            self._say_failure(connection, number)

    def _say_failure(self, connection: Connection, number: int) -> None:
        """Once, and not again for a while: a guest can cause any number of failures."""
        connection.mute()
        remedy = _REMEDIES.get(number, "look at the storage")
        text = "storage fails: %s (%d failures so far); the guest sees I/O errors: %s"
        self._log.error(text, os.strerror(number), self._failures, remedy)

        def listen_again() -> None:
            if self.connection is connection:
                connection.listen(self._alarmed)

        asyncio.get_running_loop().call_later(_QUIET_S, listen_again)

    async def _do_stop_taking(self) -> None:
        """Everything that the frontend has put on the ring before it closed is served as it comes;
        the ring is drained and given back in DISCONNECT."""

    async def _do_disconnect(self) -> None:
        self._spawn(self._disconnect_and_tell())

    async def _disconnect_and_tell(self) -> None:
        connection = self.connection
        await self._disconnect()
        if connection is not None:
            connection.end_journals()
        self.put(BackendEvent.DISCONNECT_DONE)

    async def _disconnect(self) -> None:
        """Drain what is in flight, unmap, unbind; whatever had begun to connect is undone."""
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.gather(self._connecting, return_exceptions=True)
            self._connecting = None
        if self.connection is not None:
            self.connection.drain()
            await self._released.wait()

    async def _do_unregister(self) -> None:
        self._log.info("gone")

    def apply(self, settings: Settings) -> None:
        """Go by other settings: at once as far as a connection can, and for the rest from the next
        offer on."""
        self._settings = settings
        if self.connection is not None:
            self.connection.apply(self._affordable_now(self.connection, settings))

    def _affordable_now(self, connection: Connection, settings: Settings) -> Settings:
        """The settings, as far as there is room for them beside what others have taken."""
        plan = connection.plan
        wanted = replace(
            plan.lease.claim,
            kept=settings.persistent_grants_of(plan.config.ring_pages),
            buffer_pages=settings.max_buffer_pages,
        )
        try:
            claim = plan.lease.change(wanted, LIVE)
        except BudgetError as error:
            self._log.warning("%s: what it keeps stays as it was", error)
            claim = plan.lease.claim
        return settings.within(claim)

    def squeeze(self) -> None:
        """Give back memory that is not in use, and keep none for the time that is set."""
        if self.connection is not None:
            self.connection.squeeze(self._settings.buffer_squeeze_duration_ms / 1000)

    # ---- Size ----

    async def resize(self, size: int | None = None) -> int:
        """Give the disk `size` bytes, or let it follow its storage; its 512-byte sectors then.

        The guest is told while it runs. Raises `EngineError`, or `ConfigError` where the storage is
        not open.
        """
        async with self._sizing:
            return await self._resize(size)

    async def _resize(self, size: int | None) -> int:
        if self.engine is None or self.features is None:
            raise ConfigError(f"{self.name}: its storage is not open")
        try:
            if size is not None:
                if size < self.engine.info.size and self.connection is not None:
                    # Before what lies behind it goes; the guest is told when it has gone.
                    self.connection.set_capacity(size // RING_SECTOR_SIZE)
                await self._with_storage(self.engine.resize, size)
        finally:
            self._set_sectors(await self._with_storage(self.engine.measure) // RING_SECTOR_SIZE)
        return self.features.sectors

    async def _with_storage(self, call: Callable[..., _T], *arguments: object) -> _T:
        """Do it in a thread, as storage may hang, and with nobody else at the storage."""

        def alone() -> _T:
            with self._storage:
                return call(*arguments)

        return await asyncio.to_thread(alone)

    def has_another_size(self) -> bool:
        """Whether the storage has not the size that the disk has. In any thread: it may hang."""
        with self._storage:
            if self.connection is None or self.engine is None or self.features is None:
                return False
            try:
                return self.engine.measure() // RING_SECTOR_SIZE != self.features.sectors
            except (OSError, XvdError):
                return False

    async def follow_size(self) -> None:
        """Let the disk have its storage's size, as blkback does before each request."""
        if self.connection is not None and self.engine is not None:
            with contextlib.suppress(OSError, XvdError):
                await self.resize()

    def _set_sectors(self, sectors: int) -> None:
        assert self.features is not None
        if self.connection is not None:
            self.connection.set_capacity(sectors)
        if sectors == self.features.sectors:
            return
        self._log.info("has %d sectors now, %d before", sectors, self.features.sectors)
        self.features = replace(self.features, sectors=sectors)
        self.put(BackendEvent.RESIZED)

    # ---- Figures ----

    def wake_overdue(self) -> None:
        """A lost event is to cost a delay, not the disk."""
        if self.connection is not None:
            self.connection.wake_overdue()

    def log_figures(self) -> None:
        """One line of what was counted, if ``log_stats`` is set."""
        if self._settings.log_stats:
            counters = self.counters()
            names = ("oo_req", "rd_req", "wr_req", "f_req", "ds_req", "persistent_grants")
            self._log.info("%s", ", ".join(f"{name} {counters.get(name, 0)}" for name in names))

    def counters(self) -> dict[str, object]:
        """Everything counted since the disk came up, over all connections."""
        if self.connection is None:
            return dict(self.totals)
        return merge_counters(self.totals, self.connection.counters())


_QUIET_S = 10.0
_REMEDIES = {
    errno.ENOSPC: "free some space where the image lies",
    errno.EDQUOT: "raise the quota of the image's owner",
    errno.EFBIG: "the file system cannot hold a file this large",
}

_NODES = (
    BackendAction.OFFER,
    BackendAction.PUBLISH,
    BackendAction.PUBLISH_SIZE,
    BackendAction.REPORT_ERROR,
)
