# SPDX-License-Identifier: Apache-2.0
"""One disk's frontend: the actor (xenbus/actor.py) with a frontend's actions.

What goes over the ring is the disk's (disk.py), which is told when a connection is up, when it is
down, and when there will be none again.
"""

import logging
from collections.abc import Sequence
from functools import partial

from xvd.blkif.abi import Abi, XenbusState
from xvd.blkif.assignment import FrontendAssignment, parse_frontend_assignment
from xvd.blkif.features import BackendFeatures, parse_backend, parse_offer
from xvd.blkif.handshake import (
    FrontendAction,
    FrontendEvent,
    FrontendState,
    FrontendStep,
    backend_event,
    closed_event,
    foreign_state,
    frontend_step,
    initial_frontend,
    stays_online,
)
from xvd.blkif.nodes import (
    NODES,
    FrontendConfig,
    NodeChanges,
    Side,
    format_frontend,
    parse_state,
    stale_frontend_nodes,
)
from xvd.blkif.vdev import disk_name
from xvd.errors import DiskInUse, PeerClosed, PeerProtocolError, XenstoreError, XvdError
from xvd.frontend.connection import Connection, Stepper, published
from xvd.frontend.ending import REASONS, RESET_STEP_S, RETURN_S
from xvd.frontend.patience import Deadline, Patience
from xvd.frontend.settings import Settings
from xvd.frontend.statistics import FrontCounters
from xvd.frontend.user import User
from xvd.loglimit import LogLimit
from xvd.machine.interface import Claim, Machine
from xvd.machine.xs.client import XenstoreClient
from xvd.xenbus.actor import NO_NODES, Actor, state_in
from xvd.xenbus.directory import read_directory, report_error
from xvd.xenbus.log import DeviceLog
from xvd.xenbus.runner import THREADS, Runtime


class Device(Actor[FrontendState, FrontendEvent, FrontendAction]):
    """One disk of this domain; `run` returns when it has ended.

    path: its directory, relative to this domain (``device/vbd/51712``).
    """

    def __init__(
        self,
        machine: Machine,
        store: XenstoreClient,
        path: str,
        user: User,
        *,
        abi: Abi | None = None,
        settings: Settings | None = None,
        stepper: Stepper | None = None,
        runtime: Runtime = THREADS,
    ) -> None:
        self.name = disk_name(machine.domid, path)
        log = DeviceLog(logging.getLogger(__name__), self.name, LogLimit(None))
        super().__init__(store, path, FrontendState.STARTING, frontend_step, log)
        self.assignment: FrontendAssignment | None = None
        self.features: BackendFeatures | None = None
        self.connection: Connection | None = None
        self._machine = machine
        self._user = user
        self._abi = abi or Abi.native()
        self._settings = settings or Settings()
        self._stepper = stepper
        self._runtime = runtime
        self._reset_step = Deadline(RESET_STEP_S, partial(self.put, FrontendEvent.TIMEOUT))
        self._return = Deadline(RETURN_S, partial(self.put, FrontendEvent.NOT_BACK))
        self._patience = Patience(
            self._settings.answer_timeout,
            self._progress,
            partial(self.put, FrontendEvent.UNANSWERED),
        )
        self._closing = False
        self._tries = 0
        self._failure: XvdError | None = None

    # ---- The actor ----

    async def run(self) -> None:
        """Connect, reconnect, until the user closes it or the toolstack removes it."""
        error: OSError | XvdError = PeerClosed(f"{self.name}: the disk was closed")
        claim: Claim | None = None
        try:
            claim = self._claim()
            assignment = await self._find_backend()
            own = self._written or XenbusState.UNKNOWN
            backend = await self._state_of(Side.BACKEND, assignment.backend)
            await self._act_out(initial_frontend(own, backend))
            error = self._failure or self.lost or error
        except (OSError, XvdError) as failure:
            error = failure
        finally:
            await self._end()
            if claim is not None:
                claim.close()
            self._user.ended(error)

    def _claim(self) -> Claim:
        """Before anything is touched: a second frontend would take the ring from the first."""
        try:
            return self._machine.claim(int(self.path.rpartition("/")[2]))
        except DiskInUse as error:
            raise DiskInUse(f"{self.name}: {error}") from None

    async def _find_backend(self) -> FrontendAssignment:
        """Read who serves this disk, and watch it from now on; our own state as it is written."""
        nodes = await read_directory(self._store, self.path, _own_node)
        self.assignment = assignment = parse_frontend_assignment(nodes)
        await self._unwatch()
        for path in (f"{assignment.backend}/state", f"{self.path}/state"):
            await self._watch(path)
        self._written = parse_state(Side.FRONTEND, nodes.get("state"))
        return assignment

    async def _read_events(self) -> Sequence[FrontendEvent]:
        own, backends = await self._store.try_read_each(
            [f"{self.path}/state", f"{self._known.backend}/state"]
        )
        if state_in(Side.FRONTEND, own) is foreign_state(self._written):
            return [FrontendEvent.RESUMED]
        return [backend_event(state_in(Side.BACKEND, backends))]

    async def _backend_state(self) -> XenbusState:
        return await self._state_of(Side.BACKEND, self._known.backend)

    @property
    def _known(self) -> FrontendAssignment:
        """The backend's assignment: known since `run` began."""
        assert self.assignment is not None
        return self.assignment

    async def _feed(self, event: FrontendEvent) -> None:
        await super()._feed(event)
        if self.state.final and self._failure is None and event in REASONS:
            reason = REASONS[event].format(self._settings)
            self._failure = PeerClosed(f"{self.name}: {reason}")

    async def _take(self, step: FrontendStep) -> None:
        if step.state is not self.state:
            self._reset_step.stop()
        await super()._take(step)

    async def _write(self, changes: NodeChanges, *, always: bool = False) -> bool:
        if not await super()._write(changes, always=always):
            raise PeerClosed(f"{self.name}: the toolstack has removed the disk")
        return True

    def _progress(self) -> tuple[int, int]:
        """Answers of this connection so far, and requests that have none."""
        now = self.connection.statistics().total() if self.connection else FrontCounters()
        return now.responses, now.in_flight

    async def _end(self) -> None:
        for waiting in (self._reset_step, self._return, self._patience):
            waiting.stop()
        await self._do_release()
        await self._unwatch()
        await self._stop_work()

    def close(self) -> None:
        """Finish what is on the ring and give the disk back; `run` then returns."""
        self._closing = True
        self.put(FrontendEvent.CLOSE)

    def resume(self) -> None:
        """Go on after a suspension or on another host, perhaps with another backend.

        Not for a suspension that was cancelled: nothing has changed then.
        """
        self.put(FrontendEvent.RESUMED)

    def abandon(self) -> None:
        """Return from `run` at once, leaving the nodes as they are."""
        self._closing = True
        self.put(FrontendEvent.ABANDON)

    # ---- Actions ----

    async def _do_find_backend(self) -> None:
        await self._find_backend()

    async def _do_choose(self) -> None:
        wanted = not self._closing and self._failure is None
        online = wanted and await self._online()
        self.put(closed_event(wanted=wanted, online=online, tries=self._tries))

    async def _online(self) -> bool:
        """Whether the backend will come back: its directory is there and not being removed."""
        try:
            return stays_online(await self._store.try_read(f"{self._known.backend}/online"))
        except XenstoreError:
            return False

    async def _do_await_return(self) -> None:
        """A backend that was killed comes back; one that was unloaded never does."""
        self._return.start()

    async def _do_publish(self) -> None:
        self._tries += 1
        nodes = await read_directory(self._store, self._known.backend, _backends_node)
        order, queues = parse_offer(
            nodes,
            max_ring_page_order=self._settings.max_ring_page_order,
            max_queues=self._settings.max_queues,
        )
        self.connection = await published(self._connect, self._publish, queues, order, self._log)

    async def _publish(self, config: FrontendConfig) -> None:
        present = await self._store.ls(self.path)
        await self._write(format_frontend(config, present))

    def _connect(self, queues: int, order: int) -> Connection:
        assignment = self._known
        return Connection(
            self._machine,
            assignment.backend_domid,
            abi=self._abi,
            handle=assignment.vdev,
            name=f"xvd-front-{assignment.vdev}",
            queues=queues,
            ring_page_order=order,
            settings=self._settings,
            trusted=assignment.trusted and self._settings.trusted,
        )

    async def _do_clean_up(self) -> None:
        present = await self._store.ls(self.path)
        await self._write(NodeChanges({}, stale_frontend_nodes(present)))

    async def _do_read_features(self) -> None:
        self._spawn(self._read_features())

    async def _read_features(self) -> None:
        connection = self.connection
        try:
            features = await self._backend_features()
            if connection is None or connection is not self.connection:
                return  # there is a newer one, and its features are read for it
            connection.prepare(features)
        except XvdError as error:
            self._fail(error)
            self.put(FrontendEvent.FEATURES_BAD)
        else:
            self.features = features
            self.put(FrontendEvent.FEATURES_READ)

    async def _backend_features(self) -> BackendFeatures:
        nodes = await read_directory(self._store, self._known.backend, _backends_node)
        return parse_backend(nodes, large_sectors=self._settings.large_sectors)

    async def _do_start_io(self) -> None:
        assert self.connection is not None
        assert self.features is not None
        self._tries = 0
        self._patience.stop()
        self._patience.start()
        self._return.stop()
        self.connection.use(self._runtime, self._connection_ended, self._stepper)
        self._user.connected(self.connection, self.features)

    async def _do_read_size(self) -> None:
        assert self.features is not None
        try:
            features = await self._backend_features()
        except XvdError as error:
            if await self._backend_state() is XenbusState.CONNECTED:
                self._log.warning("%s; the size stays as it was", error, event="resize-failed")
            return
        if features.sectors != self.features.sectors:
            self.features = features
            self._user.resized(features)

    async def _do_stop_io(self) -> None:
        if self.connection is not None and self.connection.running:
            self.connection.drain()
        else:
            self.put(FrontendEvent.DRAINED)

    async def _do_fail_io(self) -> None:
        if self.connection is not None and self.connection.running:
            self.connection.abandon()
        else:
            self.put(FrontendEvent.DRAINED)

    def _connection_ended(self) -> None:
        """Drained, abandoned, or broken by the backend."""
        assert self.connection is not None
        self._user.disconnected()
        if self.connection.failure:
            self._fail(
                PeerProtocolError(
                    f"{self.name}: the backend broke the protocol: {self.connection.failure}; "
                    "detach the disk and attach it again"
                )
            )
            self.put(FrontendEvent.BREACH)
        self.put(FrontendEvent.DRAINED)

    def _fail(self, error: XvdError) -> None:
        """The user hears at once: a backend that lies may never close, and `run` waits for it."""
        self._failure = error
        self._user.ended(error)

    async def _do_release(self) -> None:
        if self.connection is not None:
            await self.connection.end()
            self.connection = None

    async def _do_report_error(self) -> None:
        await report_error(self._store, self.path, str(self._failure or "the disk failed"))
        await self._write(NO_NODES)

    async def _do_arm_timer(self) -> None:
        self._reset_step.stop()
        self._reset_step.start()


def _own_node(name: str) -> bool:
    return (Side.FRONTEND, name) in NODES


def _backends_node(name: str) -> bool:
    return (Side.BACKEND, name) in NODES
