# SPDX-License-Identifier: Apache-2.0
"""One disk's frontend: it acts out what blkif/handshake.py says.

An actor like the backend's: watches and finished work put events into one queue, one task takes
them out. What goes over the ring is the disk's (disk.py), which is told when a connection is up,
when it is down, and when there will be none again.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable
from typing import Protocol

from xvd.blkif.abi import Abi, XenbusState
from xvd.blkif.handshake import (
    FrontendAction,
    FrontendEvent,
    FrontendState,
    FrontendStep,
    backend_event,
    frontend_step,
    initial_frontend,
)
from xvd.blkif.nodes import (
    NODES,
    BackendFeatures,
    FrontendAssignment,
    NodeChanges,
    Side,
    format_frontend,
    parse_backend,
    parse_frontend_assignment,
    parse_offer,
    parse_state,
    stale_frontend_nodes,
)
from xvd.blkif.vdev import disk_name
from xvd.errors import DiskInUse, PeerClosed, PeerProtocolError, XenstoreError, XvdError
from xvd.frontend.connection import Connection, Stepper, smaller
from xvd.frontend.patience import Patience
from xvd.frontend.settings import Settings
from xvd.machine.interface import Claim, Machine
from xvd.machine.xs.client import Watch, XenstoreClient
from xvd.machine.xs.pace import Pace
from xvd.machine.xs.xenbus import change_device, read_directory, report_error

RESET_STEP_S = 5.0
"""Longest wait in each step of a reset, as Linux has it (xenbus_probe_frontend.c)."""

RETURN_S = 30.0
"""How long a backend that has closed may take to offer the disk again before its user is told."""

TRIES_MAX = 5
"""Connections that a backend may refuse in a row; one that cannot would be asked for ever."""


class _Look:
    """In the queue of events: the backend's state may be another."""


class User(Protocol):
    """Who uses the device; called in the event loop's thread."""

    def connected(self, connection: Connection, features: BackendFeatures) -> None:
        """The queue may be used."""

    def resized(self, features: BackendFeatures) -> None:
        """The capacity has changed."""

    def disconnected(self) -> None:
        """The queue is gone; what was outstanding has to be submitted again to the next one."""

    def ended(self, error: OSError | XvdError) -> None:
        """There will be no next one. May be said twice."""


class Device:
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
    ) -> None:
        self.path = path
        self.name = disk_name(machine.domid, path)
        self.state = FrontendState.STARTING
        self.assignment: FrontendAssignment | None = None
        self.features: BackendFeatures | None = None
        self.connection: Connection | None = None
        self._machine = machine
        self._store = store
        self._user = user
        self._abi = abi or Abi.native()
        self._settings = settings or Settings()
        self._stepper = stepper
        self._log = logging.getLogger(__name__)
        self._events: asyncio.Queue[FrontendEvent | _Look | None] = asyncio.Queue()
        self._looking = False
        self._watch: Watch | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._return: asyncio.TimerHandle | None = None
        self._patience = Patience(
            self._settings.answer_timeout, self._progress, self._end_of_patience
        )
        self._written: XenbusState | None = None
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
            own = await self._find_backend()
            await self._take(initial_frontend(own, await self._backend_state()))
            while self.state is not FrontendState.VACANT:
                event = await self._next()
                if event is None:
                    break
                if event is FrontendEvent.RESUMED:
                    await self._find_backend()
                await self._take(frontend_step(self.state, event))
                await self._after()
            error = self._failure or error
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

    async def _find_backend(self) -> XenbusState:
        """Read who serves this disk, and watch it from now on; our own state as it is written."""
        nodes = await read_directory(self._store, self.path, _own_node)
        self.assignment = parse_frontend_assignment(nodes)
        if self._watch is not None:
            await self._watch.close()
        self._watch = await self._store.watch(f"{self.assignment.backend}/state")
        self._spawn(self._follow(self._watch))
        self._written = parse_state(Side.FRONTEND, nodes.get("state"))
        return self._written

    async def _next(self) -> FrontendEvent | None:
        """The next event, None to leave; what the backend's state is, is seen when it is taken."""
        event = await self._events.get()
        if not isinstance(event, _Look):
            return event
        self._looking = False
        state = await self._backend_state()
        if state is XenbusState.UNKNOWN and self.state is FrontendState.STARTING:
            self._failure = PeerClosed(f"{self.name}: there is no backend; the disk was removed")
            return None
        return backend_event(state)

    async def _after(self) -> None:
        """CLOSED is where a way is chosen: away for good, or back for the next backend."""
        if self.state is not FrontendState.CLOSED:
            return
        if self._tries >= TRIES_MAX and not self._failure:
            self._failure = PeerClosed(
                f"{self.name}: the backend has refused {self._tries} connections in a row; its log "
                f"and its error node say why"
            )
        if not self._closing and not self._failure and await self._online():
            self._await_return()
            await self._take(frontend_step(self.state, FrontendEvent.REOPEN))
        else:
            if not self._closing and not self._failure:
                self._failure = PeerClosed(f"{self.name}: the disk was removed")
            await self._take(frontend_step(self.state, FrontendEvent.LEAVE))

    def _await_return(self) -> None:
        """A backend that was killed comes back; one that was unloaded never does."""
        if self._return is None:
            text = f"has closed and not come back within {RETURN_S:g} s"
            events = asyncio.get_running_loop()
            self._return = events.call_later(RETURN_S, self._give_up, text)

    def _give_up(self, why: str) -> None:
        text = f"{self.name}: the backend {why}; start one, and open the disk again"
        self._failure = PeerClosed(text)
        self._events.put_nowait(None)

    def _stop_waiting(self) -> None:
        if self._return is not None:
            self._return.cancel()
            self._return = None

    def _progress(self) -> tuple[int, int]:
        """Answers of this connection so far, and requests that have none."""
        counters = [queue.counters() for queue in self.connection.queues] if self.connection else []
        answered = sum(one["responses"] for one in counters)
        return answered, sum(one["in_flight"] for one in counters)

    def _end_of_patience(self) -> None:
        self._give_up(f"has answered nothing for {self._settings.answer_timeout:g} s")

    async def _online(self) -> bool:
        """Whether the backend will come back: its directory is there and not being removed."""
        assert self.assignment is not None
        try:
            online = await self._store.try_read(f"{self.assignment.backend}/online")
        except XenstoreError:
            return False
        return online is not None and online.strip("\0 \n") != "0"

    async def _end(self) -> None:
        self._stop_timer()
        self._patience.stop()
        self._stop_waiting()
        await self._release()
        if self._watch is not None:
            with contextlib.suppress(XvdError):
                await self._watch.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def close(self) -> None:
        """Finish what is on the ring and give the disk back; `run` then returns."""
        self._closing = True
        if self.state in (FrontendState.CLOSED, FrontendState.HANDED_BACK):
            return
        if self.state in (FrontendState.RESET_CLOSING, FrontendState.RESET_CLOSED):
            self.abandon()  # nothing of ours is published yet; the next driver begins again here
            return
        self.put(FrontendEvent.CLOSE)

    def resume(self) -> None:
        """This domain goes on after a suspension or on another host, perhaps with another backend.

        Not for a suspension that was cancelled: nothing has changed then.
        """
        self.put(FrontendEvent.RESUMED)

    def abandon(self) -> None:
        """Return from `run` at once, leaving the nodes as they are."""
        self._closing = True
        self._events.put_nowait(None)

    async def ended(self, running: asyncio.Task[None], timeout_s: float | None) -> None:
        """Wait for `run`, which was asked to end; after `timeout_s` seconds, if any, abandon it."""
        try:
            if (await asyncio.wait([running], timeout=timeout_s))[1]:
                self.abandon()
                if (await asyncio.wait([running], timeout=_ABANDONED_S))[1]:
                    running.cancel()  # it waits for a store that does not answer
        except asyncio.CancelledError:
            running.cancel()
            raise
        finally:
            await asyncio.gather(running, return_exceptions=True)

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def put(self, event: FrontendEvent) -> None:
        """Tell the device something, from the event loop's thread."""
        self._events.put_nowait(event)

    async def _take(self, step: FrontendStep) -> None:
        """Go where a step leads and act; the state goes with an action's nodes, or before all."""
        if step.state is not self.state:
            self._log.debug("%s: %s -> %s", self.path, self.state.name, step.state.name)
            self._stop_timer()
        self.state = step.state
        if not any(action in _NODES for action in step.actions):
            await self._write(NodeChanges({}))
        for action in step.actions:
            await getattr(self, f"_do_{action.name.lower()}")()

    async def _write(self, changes: NodeChanges) -> None:
        state = self.state.xenbus
        if state == self._written:
            state = None
        if state is None and not changes.write and not changes.remove:
            return
        there = await change_device(
            self._store, self.path, state=state, write=changes.write, remove=changes.remove
        )
        if not there:
            raise PeerClosed(f"{self.name}: the toolstack has removed the disk")
        if state is not None:
            self._written = state

    # ---- Looking ----

    async def _follow(self, watch: Watch) -> None:
        pace = Pace()
        try:
            async for _ in watch:
                if wait_s := pace.wait_s():
                    await asyncio.sleep(wait_s)
                self._look()
        except PeerClosed as error:
            self._failure = error
            self._events.put_nowait(None)

    async def _backend_state(self) -> XenbusState:
        assert self.assignment is not None
        try:
            text = await self._store.try_read(f"{self.assignment.backend}/state")
            return parse_state(Side.BACKEND, text)
        except (PeerProtocolError, XenstoreError):
            return XenbusState.UNKNOWN

    def _look(self) -> None:
        """Look at the backend's state, once however often it has changed (XSA-349)."""
        if not self._looking:
            self._looking = True
            self._events.put_nowait(_Look())

    # ---- Actions ----

    async def _do_look(self) -> None:
        self._look()

    async def _do_publish(self) -> None:
        assert self.assignment is not None
        self._tries += 1
        nodes = await read_directory(self._store, self.assignment.backend, _backends_node)
        order, queues = parse_offer(
            nodes,
            max_ring_page_order=self._settings.max_ring_page_order,
            max_queues=self._settings.max_queues,
        )
        while True:
            self.connection = self._connect(queues, order)
            queues, order = self.connection.size
            present = await self._store.ls(self.path)
            try:
                return await self._write(format_frontend(self.connection.config, present))
            except XenstoreError as error:
                less = smaller(queues, order)
                if error.code not in _QUOTA or less is None:
                    raise
                self._log.info("%s: %s: fewer queues or smaller rings", self.name, error)
                self.connection.release()
                queues, order = less

    def _connect(self, queues: int, order: int) -> Connection:
        assert self.assignment is not None
        return Connection(
            self._machine,
            self.assignment.backend_domid,
            abi=self._abi,
            handle=self.assignment.vdev,
            name=f"xvd-front-{self.assignment.vdev}",
            queues=queues,
            ring_page_order=order,
            settings=self._settings,
            trusted=self.assignment.trusted and self._settings.trusted,
            on_exit=self._connection_ended,
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
        assert self.assignment is not None
        nodes = await read_directory(self._store, self.assignment.backend, _backends_node)
        return parse_backend(nodes, large_sectors=self._settings.large_sectors)

    async def _do_start_io(self) -> None:
        assert self.connection is not None
        assert self.features is not None
        self._tries = 0
        self._patience.stop()
        self._patience.start()
        self._stop_waiting()
        self.connection.start(self._stepper)
        self._user.connected(self.connection, self.features)

    async def _do_read_size(self) -> None:
        assert self.features is not None
        try:
            features = await self._backend_features()
        except XvdError as error:
            if await self._backend_state() is XenbusState.CONNECTED:
                self._log.warning("%s: %s; the size stays as it was", self.name, error)
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
        if self.connection.failure is not None:
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
        await self._release()

    async def _release(self) -> None:
        if self.connection is not None:
            await self.connection.end()
            self.connection = None

    async def _do_report_error(self) -> None:
        await report_error(self._store, self.path, str(self._failure or "the disk failed"))
        await self._write(NodeChanges({}))

    async def _do_arm_timer(self) -> None:
        self._stop_timer()
        events = asyncio.get_running_loop()
        self._timer = events.call_later(RESET_STEP_S, self.put, FrontendEvent.TIMEOUT)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


_ABANDONED_S = 1.0
"""For `run` to notice that it is to return."""
_QUOTA = ("ENOSPC", "EQUOTA", "E2BIG")
"""What a store says that has no room for our nodes: a frontend of many queues writes hundreds."""
_NODES = (FrontendAction.PUBLISH, FrontendAction.CLEAN_UP, FrontendAction.REPORT_ERROR)


def _own_node(name: str) -> bool:
    return (Side.FRONTEND, name) in NODES


def _backends_node(name: str) -> bool:
    return (Side.BACKEND, name) in NODES
