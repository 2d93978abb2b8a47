# SPDX-License-Identifier: Apache-2.0
"""One disk's backend: the actor (xenbus/actor.py) with a backend's actions.

Nothing negotiated survives a disconnect: every connect reads every node again.
"""

import asyncio
import contextlib
import errno
import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from xvd.backend.budget import Budget, Room
from xvd.backend.connection import Connection, Plan
from xvd.backend.copies import Copies
from xvd.backend.disk import ServedDisk
from xvd.backend.groups import Groups
from xvd.backend.hold import Hold
from xvd.backend.life import StorageLife
from xvd.backend.negotiation import (
    Agreement,
    announced_features,
    features_of,
    negotiate,
    own_node,
)
from xvd.backend.settings import Settings
from xvd.backend.snapshots import Snapshots
from xvd.backend.state import DiskState
from xvd.backend.tracking import Tracking
from xvd.blkif.abi import XenbusState
from xvd.blkif.assignment import BackendAssignment, parse_backend_assignment, with_image
from xvd.blkif.features import (
    NOT_OPENING,
    BackendFeatures,
    format_backend,
    format_offer,
    format_size,
    with_offer,
    without,
)
from xvd.blkif.handshake import (
    BackendAction,
    BackendEvent,
    BackendState,
    backend_step,
    foreign_state,
    frontend_event,
    initial_backend,
    removal_event,
    stays_online,
)
from xvd.blkif.nodes import Side, parse_state
from xvd.blkif.vdev import disk_name
from xvd.engines.interface import Engine
from xvd.errors import EngineError, EventChannelError, XenstoreError, XvdError, describe
from xvd.loglimit import LogLimit
from xvd.machine.interface import Machine
from xvd.machine.xs.client import XenstoreClient
from xvd.xenbus.actor import Actor, state_in
from xvd.xenbus.directory import read_directory, report_error
from xvd.xenbus.inbox import Order
from xvd.xenbus.log import DeviceLog
from xvd.xenbus.runner import THREADS, Runtime, leave_alone

STORAGE_PATIENCE_S = 5.0
"""How long the end of a disk waits for storage that does not answer."""
OFFER_S = 1.0
"""How long storage is being opened before the disk is offered: libxl waits for that, for 10 s."""
BUSY_S = 0.5
"""How long after storage that somebody else has is tried again."""

StorageOpener = Callable[[BackendAssignment], Awaitable[Engine]]


class Device(Actor[BackendState, BackendEvent, BackendAction]):
    """One disk of this backend domain; `run` returns when it is gone or `stop` has ended it.

    path: its directory, relative to this domain (``backend/vbd/1/51712``). budget: what this host
    has for it and others; without end if there is none. groups: those it may be in. log_limit: its
    guest's. rival: who else serves such disks here, in words; mostly nobody. runtime: who runs its
    queues.
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
        groups: Groups | None = None,
        log_limit: LogLimit | None = None,
        rival: Callable[[], str] = str,
        runtime: Runtime = THREADS,
    ) -> None:
        self.name = disk_name(path.split("/")[-2], path)
        log = DeviceLog(logging.getLogger(__name__), self.name, log_limit or LogLimit(None))
        super().__init__(store, path, BackendState.STARTING, backend_step, log)
        self.assignment: BackendAssignment | None = None
        settings = settings or Settings()
        room = Room(budget or Budget(), log)
        self.disk = ServedDisk(
            log, room, groups or Groups(), settings, runtime,
            resized=partial(self.put, BackendEvent.RESIZED),
        )  # fmt: skip
        self._machine = machine
        self._open_storage = open_storage
        self._rival = rival
        self._runtime = runtime
        self._kept = DiskState(settings.state_dir, path)
        self.tracking = Tracking(self._kept, log)
        self.life = StorageLife(
            self.disk,
            self._kept,
            log,
            runtime,
            opened=self._open_other,
            offers=lambda engine: features_of(engine, self._assigned, self.disk.settings),
            swapped=self._has_image,
            tracking=self.tracking,
            is_held=lambda: bool(self.hold.why),
        )
        parts = (self.life, self.disk, self.tracking, log, runtime)
        self.copies, self.snapshots = Copies(*parts), Snapshots(*parts)
        self.hold = Hold(self.disk, log, partial(report_error, store, path))
        self._opening: asyncio.Task[None] | None = None
        self._announced: BackendFeatures | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._error = ""
        self._ending = asyncio.Event()
        self.tried = asyncio.Event()
        """Set once it has its storage, or an error instead."""

    # ---- The actor ----

    async def run(self) -> None:
        """Serve the disk until the toolstack removes it, or `stop`."""
        try:
            nodes = await read_directory(self._store, self.path, own_node)
            self.assignment = assignment = parse_backend_assignment(nodes)
            self._written = own = parse_state(Side.BACKEND, nodes.get("state"))
            first = initial_backend(own, await self._frontend_state())
            self._forget_others(own, first.state)
            for path in (f"{assignment.frontend}/state", self.path):
                await self._watch(path)
            self._opening = asyncio.ensure_future(self._open())
            await self._act_out(first)
        except XvdError as error:
            await self._report_unless_removed(error)
        finally:
            await self._end()

    async def _report_unless_removed(self, error: XvdError) -> None:
        """Report an error, unless it came from the toolstack removing the nodes."""
        with contextlib.suppress(XvdError):
            if not await self._store.exists(f"{self.path}/frontend"):
                self._log.info("removed: %s", error, event="gone")
                return
            await report_error(self._store, self.path, str(error))
        self._log.error("%s; this disk is not served", error, event="failed")

    async def stop(self) -> None:
        """Finish what is in flight, unmap, and leave the nodes as they are.

        The frontend's ring stays live: whoever serves this directory next attaches to it.
        """
        await self._disconnect()
        self._inbox.put(Order.LEAVE)

    async def _end(self) -> None:
        self._ending.set()
        self.tried.set()
        await self.hold.end()
        await self._disconnect()
        await self._unwatch()
        await self._stop_work()
        closing = asyncio.ensure_future(self._close_storage())
        if (await asyncio.wait([closing], timeout=STORAGE_PATIENCE_S))[1]:
            self._log.error(
                "its storage does not answer: left alone, to be closed if it does",
                event="storage-hangs",
            )
            leave_alone(closing)

    async def _close_storage(self) -> None:
        if self._opening is not None:
            # Not cancelled: what it opens would be nobody's, and stay open and locked.
            await self._opening
        await self.copies.end()
        async with self.life.turn:
            await self.life.close_old(self.disk.close)
        self.tracking.close()

    def _foreign_state(self) -> XenbusState | None:
        return foreign_state(self._written)

    async def _read_events(self) -> Sequence[BackendEvent]:
        own, online, frontends = await self._store.try_read_each(
            [f"{self.path}/state", f"{self.path}/online", f"{self._assigned.frontend}/state"]
        )
        if isinstance(own, XenstoreError):
            raise own
        if isinstance(online, XenstoreError):
            raise online
        foreign = self._foreign_state()
        if foreign is not None and own == str(int(foreign)):
            return [BackendEvent.REPLACED]
        frontend = state_in(Side.FRONTEND, frontends)
        stays = stays_online(online)
        return [*([] if stays else [removal_event(frontend)]), frontend_event(frontend)]

    async def _frontend_state(self) -> XenbusState:
        return await self._state_of(Side.FRONTEND, self._assigned.frontend)

    # ---- What it has ----

    @property
    def _assigned(self) -> BackendAssignment:
        """The toolstack's assignment: known since `run` began."""
        assert self.assignment is not None
        return self.assignment

    # ---- Storage ----

    def _forget_others(self, own: XenbusState, first: BackendState) -> None:
        """Forget what is kept of another disk of this name, if this one is new; and of an ended
        connection, if its frontend has closed meanwhile."""
        if own in (XenbusState.UNKNOWN, XenbusState.INITIALISING):
            self._kept.gone()
        elif own is XenbusState.CONNECTED and first is not BackendState.RESUMING:
            self._kept.disconnected()

    async def _open_other(self, image: str) -> Engine:
        return await self._open_storage(with_image(self._assigned, image, served=False))

    def _has_image(self, image: str) -> None:
        self.assignment = with_image(self._assigned, image, served=True)

    async def _open(self) -> None:
        decided = self._kept.decision()
        self.disk.paused = decided.paused
        if decided.image:
            self._has_image(decided.image)
        assignment = self._assigned
        slow = partial(self.put, BackendEvent.STORAGE_SLOW)
        waits = asyncio.get_running_loop().call_later(OFFER_S, slow)
        try:
            engine = await self._open_patiently(assignment)
            try:
                self._kept.check_identity(engine.identity)
                engine = self.tracking.opened(engine)
            except BaseException:
                await self._runtime.call(engine.close)
                raise
        except (OSError, XvdError) as error:
            self._error = f"cannot open {assignment.image!r}: {describe(error)}"
            self._log.error("%s", self._error, event="storage-failed")
            self.put(BackendEvent.STORAGE_FAILED)
        else:
            self.disk.has_opened(engine, features_of(engine, assignment, self.disk.settings))
            self.put(BackendEvent.STORAGE_READY)
        finally:
            waits.cancel()
        self.tried.set()

    async def _open_patiently(self, assignment: BackendAssignment) -> Engine:
        """Open a disk's storage; a guest that is connected waits while somebody else has it, as one
        may for a moment who looks at an image: no other storage would do."""
        while True:
            try:
                return await self._open_storage(assignment)
            except EngineError as error:
                connected = self._written is XenbusState.CONNECTED
                if error.errno != errno.EBUSY or not connected or self._ending.is_set():
                    raise
                self._log.warning(
                    "waits for its storage: %s", describe(error), event="storage-busy"
                )
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(BUSY_S):
                    await self._ending.wait()

    # ---- Actions: nodes ----

    async def _do_announce(self) -> None:
        settings = self.disk.settings
        self._announced = self.disk.room.affordable(announced_features(settings), settings)
        self._log.info("its storage is still being opened: offered meanwhile", event="storage-slow")
        await self._write(format_offer(self._announced, opening=True))

    async def _do_offer(self) -> None:
        # Anew for each frontend: what was promised to the last one, or withdrawn, ends with it.
        storage, settings = self.disk.storage, self.disk.settings
        features = features_of(storage.engine, self._assigned, settings)
        if self._announced is None:
            storage.features = self.disk.room.affordable(features, settings)
        else:
            storage.features, self._announced = with_offer(features, self._announced), None
        await self._write(format_offer(storage.features))

    async def _do_publish(self) -> None:
        await self._write(format_backend(self.disk.storage.features))

    async def _do_publish_size(self) -> None:
        features = self.disk.storage.features
        await self._write(format_size(features.sectors, features.wire_sector), always=True)

    async def _do_report_error(self) -> None:
        # The reason first: the toolstack that sees the state looks for it at once.
        await report_error(self._store, self.path, self._error or "the disk failed")
        await self._write(NOT_OPENING)

    async def _do_unregister(self) -> None:
        self._kept.end()
        self._log.info("gone", event="gone")

    # ---- Actions: the connection ----

    async def _do_connect(self) -> None:
        self._connecting = asyncio.ensure_future(self._connect(resume=False))

    async def _do_reconnect(self) -> None:
        self._connecting = asyncio.ensure_future(self._connect(resume=True))

    async def _connect(self, *, resume: bool) -> None:
        disk, assignment = self.disk, self._assigned
        try:
            await disk.storage.measure()
            agreed = await negotiate(
                self._store, self.path, assignment.frontend, disk.storage.features, disk.settings,
                resume=resume,
            )  # fmt: skip
            # That which it has now: it may have been exchanged while nodes were read.
            disk.storage.agreed(agreed.features, resumed=resume)
            name = f"xvd-{assignment.frontend_domid}-{assignment.name}"
            connection = Connection(self._plan(agreed, resume), name)
            if self.disk.paused:
                connection.halt()
            connection.serve(
                self._runtime, on_end=self._ended, on_failure=self._storage_failed,
                on_withdrawn=self._withdrawn, on_held=self.hold.begin,
            )  # fmt: skip
        except Exception as error:  # a mistake of ours too is to cost this disk only, and be told
            self._connect_failed(error, resume=resume)
            return
        self.disk.connection, config = connection, agreed.config
        if connection.set_aside:
            self._log.warning(
                "%s; nothing was unanswered", connection.set_aside, event="journal-set-aside"
            )
        layout = f"queues: {len(config.queues)}, ring pages: {config.ring_pages}"
        self._log.info(
            "connected (%s, %s, %s)",
            config.abi.protocol,
            connection.mode,
            layout,
            event="connected",
        )
        self.put(BackendEvent.CONNECT_DONE)
        if agreed.has_grown:
            self.put(BackendEvent.RESIZED)  # while nobody served it; the state has to be repeated

    def _plan(self, agreed: Agreement, resume: bool) -> Plan:
        lease = self.disk.room.take(agreed.features, self.disk.settings, agreed.config)
        return Plan(
            self._machine,
            self._assigned.frontend_domid,
            agreed.config,
            agreed.features,
            self.disk.storage.engine,
            lease.claim.limit(self.disk.settings),
            lease,
            self._kept,
            self.disk.throttles,
            resume=resume,
        )

    def _connect_failed(self, error: Exception, *, resume: bool) -> None:
        if not resume:
            self._kept.disconnected()
        frontend, text = self._assigned.frontend, describe(error)
        if isinstance(error, EventChannelError) and (other := self._rival()):
            text += f": the disk is served by {other}"
        self._error = f"cannot connect to {frontend}: {text}"
        told = isinstance(error, XvdError | OSError)  # what is not is a mistake of ours
        self._log.error(
            "cannot connect to %s: %s", frontend, text, exc_info=not told, event="connect-failed"
        )
        self.put(BackendEvent.CONNECT_FAILED)

    def _ended(self, connection: Connection) -> None:
        """The queues are drained, or a ring is broken."""
        self.disk.has_ended(connection)
        if why := connection.failure:
            self._error = why
            self._log.error("%s", why, event="ring-broken")
            self.put(BackendEvent.RING_BROKEN)

    def _storage_failed(self, number: int, failures: int) -> None:
        storage = self.disk.storage
        storage.said.failed(storage.engine, number, failures)
        if number == errno.EIO:  # it may have become smaller
            self._spawn(self.disk.follow_size())

    def _withdrawn(self, operations: int) -> None:
        storage = self.disk.storage
        features = without(storage.features, operations)
        if features != storage.features:
            self._log.info(
                "the storage cannot do what it was thought to: offered no more", event="withdrawn"
            )
            storage.features = features
            self.put(BackendEvent.WITHDRAWN)

    async def _do_disconnect(self) -> None:
        self._spawn(self._disconnect_and_tell())

    async def _disconnect_and_tell(self) -> None:
        connected = self.disk.connection is not None
        await self._disconnect()
        if connected:
            self._kept.disconnected()
        self.put(BackendEvent.DISCONNECT_DONE)

    async def _disconnect(self) -> None:
        """Drain what is in flight, unmap, unbind; whatever had begun to connect is undone."""
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.gather(self._connecting, return_exceptions=True)
            self._connecting = None
        await self.disk.disconnect()
