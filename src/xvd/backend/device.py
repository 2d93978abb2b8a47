# SPDX-License-Identifier: Apache-2.0
"""One disk's backend: it acts out what blkif/handshake.py says.

An actor: watches and finished work put events into one queue, one task takes them out, one at a
time. Nothing negotiated survives a disconnect: every connect reads every node again.
"""

import asyncio
import contextlib
import errno
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace

from xvd.backend.blocking import InTurn
from xvd.backend.budget import Budget
from xvd.backend.connection import Connection, Plan
from xvd.backend.counters import merge_counters, without_now
from xvd.backend.features import (
    agreed_unit,
    features_of,
    promised,
    without,
)
from xvd.backend.inbox import Inbox
from xvd.backend.log import DeviceLog
from xvd.backend.reading import frontends_node, own_node
from xvd.backend.room import Room
from xvd.backend.settings import Settings
from xvd.backend.state import DiskState
from xvd.backend.storage_log import StorageLog
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
    BackendAssignment,
    BackendFeatures,
    NodeChanges,
    Side,
    format_backend,
    format_offer,
    format_size,
    parse_backend_assignment,
    parse_frontend,
    parse_state,
)
from xvd.blkif.vdev import disk_name
from xvd.engines.interface import Engine
from xvd.errors import (
    ConfigError,
    EventChannelError,
    PeerClosed,
    PeerProtocolError,
    XenstoreError,
    XvdError,
    describe,
)
from xvd.loglimit import LogLimit
from xvd.machine.interface import Machine
from xvd.machine.xs.client import Watch, XenstoreClient
from xvd.machine.xs.pace import Pace
from xvd.machine.xs.xenbus import change_device, read_directory, report_error
from xvd.types import RING_SECTOR_SIZE

STORAGE_PATIENCE_S = 5.0
"""How long the end of a disk waits for storage that does not answer."""

StorageOpener = Callable[[BackendAssignment], Awaitable[Engine]]


class Device:
    """One disk of this backend domain; `run` returns when it is gone or `stop` has ended it.

    path: its directory, relative to this domain (``backend/vbd/1/51712``). budget: what this host
    has for it and others; without end if there is none. log_limit: its guest's. rival: who
    else serves such disks here, in words; mostly nobody.
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
        log_limit: LogLimit | None = None,
        rival: Callable[[], str] = str,
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
        self._rival = rival
        self._kept = DiskState(self._settings.state_dir, path)
        self._log = DeviceLog(logging.getLogger(__name__), self.name, log_limit or LogLimit(None))
        self._room = Room(budget or Budget(), self._log)
        self._said = StorageLog(self._log)
        self._events = Inbox()
        self._sizing = asyncio.Lock()  # one look at the size, or change of it, at a time
        self._storage = InTurn()  # who measures, resizes or closes it
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
            nodes = await read_directory(self._store, self.path, own_node)
            self.assignment = parse_backend_assignment(nodes)
            self._written = own = parse_state(Side.BACKEND, nodes.get("state"))
            self.state = initial_backend(own, await self._frontend_state()).state
            self._forget_others(own)
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
        closing = asyncio.ensure_future(self._close_storage())
        if (await asyncio.wait([closing], timeout=STORAGE_PATIENCE_S))[1]:
            self._log.error("its storage does not answer: left alone, to be closed if it does")
            _LEFT_ALONE.add(closing)
            closing.add_done_callback(_LEFT_ALONE.discard)

    async def _close_storage(self) -> None:
        if self._opening is not None:
            # Not cancelled: what it opens would be nobody's, and stay open and locked.
            await self._opening
        if self.engine is not None:
            async with self._sizing:
                engine, self.engine = self.engine, None
                await self._storage.call(engine.close)

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

    def _forget_others(self, own: XenbusState) -> None:
        """What is kept of a disk of this name is of the one before, if this one is new; and of a
        connection that is over, if its frontend has let go meanwhile."""
        if own in (XenbusState.UNKNOWN, XenbusState.INITIALISING):
            self._kept.gone()
        elif own is XenbusState.CONNECTED and self.state is not BackendState.RESUMING:
            self._kept.disconnected()

    async def _open(self) -> None:
        assert self.assignment is not None
        try:
            self.engine = await self._open_storage(self.assignment)
            self._kept.check_identity(self.engine.identity)
        except (OSError, XvdError) as error:
            if self.engine is not None:
                engine, self.engine = self.engine, None
                await self._storage.call(engine.close)
            self._error = f"cannot open {self.assignment.image!r}: {describe(error)}"
            self._log.error("%s", self._error)
            self.put(BackendEvent.STORAGE_FAILED)
            return
        self.features = self._features_now()
        self.put(BackendEvent.STORAGE_READY)

    def _features_now(self) -> BackendFeatures:
        assert self.engine is not None
        assert self.assignment is not None
        return features_of(self.engine, self.assignment, self._settings)

    # ---- Actions ----

    async def _do_offer(self) -> None:
        # Anew for each frontend: what was promised to the last one, or withdrawn, ends with it.
        self.features = self._room.affordable(self._features_now(), self._settings)
        await self._write(format_offer(self.features))

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
        try:
            await self._measure(resume)
            plan, grown = await self._negotiate(resume)
            name = f"xvd-{self.assignment.frontend_domid}-{self.assignment.name}"
            self.connection = Connection(plan, name)
            self.connection.start(self._threads_ended)
        except Exception as error:  # a mistake of ours too is to cost this disk only, and be told
            if self.connection is not None:
                self.connection.release()
                self.connection = None
            if not resume:
                self._kept.disconnected()
            frontend, text = self.assignment.frontend, describe(error)
            if isinstance(error, EventChannelError) and (other := self._rival()):
                text += f": the disk is served by {other}"
            self._error = f"cannot connect to {frontend}: {text}"
            told = isinstance(error, XvdError | OSError)  # what is not is a mistake of ours
            self._log.error("cannot connect to %s: %s", frontend, text, exc_info=not told)
            return self.put(BackendEvent.CONNECT_FAILED)
        if resume:
            self.connection.kick()
        if self.connection.set_aside:
            self._log.warning("%s; nothing was unanswered", self.connection.set_aside)
        self.connection.listen(self._alarmed)
        queues, pages = len(plan.config.queues), plan.config.ring_pages
        layout = f"queues: {queues}, ring pages: {pages}"
        self._log.info("connected (%s, %s, %s)", plan.config.abi.protocol, self.mode, layout)
        self.put(BackendEvent.CONNECT_DONE)
        if grown:
            self.put(BackendEvent.RESIZED)  # while nobody served it; the state has to be repeated

    async def _negotiate(self, resume: bool) -> tuple[Plan, bool]:
        """Read what the frontend published, and agree; (how to serve it, whether the disk grew)."""
        assert self.assignment is not None
        assert self.engine is not None
        assert self.features is not None
        published = None
        if resume:
            own = await read_directory(self._store, self.path, own_node)
            self.features = promised(self.features, own)
            published = own.get("sectors")
            size = self.features.sectors * RING_SECTOR_SIZE
            if size > self.engine.info.size:
                self._said.smaller(self.engine.info.size, size)
        wanted = frontends_node(self.features)
        nodes = await read_directory(self._store, self.assignment.frontend, wanted)
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
        self._broken, self._failures = False, 0
        lease = self._room.take(self.features, self._settings, config)
        plan = Plan(
            self._machine,
            self.assignment.frontend_domid,
            config,
            self.features,
            self.engine,
            self._settings.within(lease.claim),
            lease,
            self._kept,
            resume=resume,
        )
        return plan, grown

    async def _measure(self, resume: bool) -> None:
        """A frontend that connects is told the size that the storage has then, whatever it was."""
        async with self._sizing:
            if self.engine is not None and self.features is not None:
                sectors = await self._storage.call(self.engine.measure) // RING_SECTOR_SIZE
                self.features = replace(self.features, sectors=sectors)

    @property
    def mode(self) -> str:
        """How data is moved: "grant copy", "mapping" (for each request) or "persistent grants"."""
        otherwise = "grant copy" if self._settings.copying else "mapping"
        return otherwise if self.connection is None else self.connection.mode

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
        connection = self.connection
        assert connection is not None
        assert self.features is not None
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
        self._said.failed(self.engine, number, self._failures)
        if number == errno.EIO:
            self._spawn(self.follow_size())  # perhaps it was cut short

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
            self._kept.disconnected()
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
        self._kept.gone()
        self._log.info("gone")

    def apply(self, settings: Settings) -> None:
        """Go by other settings: at once as far as a connection can, and for the rest from the next
        offer on."""
        self._settings = settings
        if self.connection is not None:
            plan = self.connection.plan
            pages = plan.config.ring_pages
            self.connection.apply(self._room.change(plan.lease, pages, settings))

    def squeeze(self) -> None:
        """Give back memory that is not in use, and keep none for the time that is set."""
        if self.connection is not None:
            self.connection.squeeze(self._settings.buffer_squeeze_duration_ms / 1000)

    # ---- Size ----

    async def resize(self, size: int | None = None, *, shrink: bool = False) -> int:
        """Give the disk `size` bytes, or let it follow its storage; its 512-byte sectors then.

        The guest is told while it runs. shrink: also if storage that is followed is smaller than
        the disk. Raises `EngineError`, or `ConfigError` where the storage is not open, or smaller.
        """
        async with self._sizing:
            found = await self._resize(size, shrink=shrink)
        if self.features is not None and found < (has := self.features.sectors):
            text = f"its storage has {found} sectors, the disk {has}; see --shrink"
            raise ConfigError(f"{self.name}: {text}")
        return found

    async def _resize(self, size: int | None, *, shrink: bool) -> int:
        """The sectors that the storage has then; the disk has no fewer, unless it may shrink."""
        if self.engine is None or self.features is None:
            raise ConfigError(f"{self.name}: its storage is not open")
        try:
            if size is not None:
                shrink = True
                if size < self.engine.info.size and self.connection is not None:
                    # Before what lies behind it goes; the guest is told when it has gone.
                    self.connection.set_capacity(size // RING_SECTOR_SIZE)
                await self._storage.call(self.engine.resize, size)
        finally:
            found = await self._storage.call(self.engine.measure) // RING_SECTOR_SIZE
            if found >= self.features.sectors or shrink:
                self.engine.accept_size()
                self._set_sectors(found)
        return found

    def has_another_size(self) -> bool:
        """Whether the storage has not the size that the disk has. In any thread: it may hang."""
        with self._storage.lock:
            if self.connection is None or self.engine is None or self.features is None:
                return False
            try:
                return self.engine.measure() // RING_SECTOR_SIZE != self.features.sectors
            except (OSError, XvdError):
                return False

    async def follow_size(self) -> None:
        """Let the disk grow with its storage, as blkback does before each request.

        Where that became smaller, what is gone is an error, and no end that somebody wanted.
        """
        if self.connection is not None and self.engine is not None:
            with contextlib.suppress(OSError, XvdError):
                async with self._sizing:
                    await self._resize(None, shrink=False)
            self._said.looked(self.engine)

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
            counts, names = self.counters(), "oo_req rd_req wr_req f_req ds_req persistent_grants"
            self._log.info("%s", ", ".join(f"{it} {counts.get(it, 0)}" for it in names.split()))

    def counters(self) -> dict[str, object]:
        """Everything counted since the disk came up, over all connections."""
        if self.connection is None:
            return dict(self.totals)
        return merge_counters(self.totals, self.connection.counters())


_LEFT_ALONE: set[asyncio.Future[None]] = set()  # waits for storage that may never answer

_QUIET_S = 10.0
_NODES = (
    BackendAction.OFFER,
    BackendAction.PUBLISH,
    BackendAction.PUBLISH_SIZE,
    BackendAction.REPORT_ERROR,
)
