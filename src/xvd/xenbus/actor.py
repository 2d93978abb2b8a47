# SPDX-License-Identifier: Apache-2.0
"""One end of a device: it acts out its table of blkif/handshake.py.

An actor: watches and finished work put events into one queue, one task takes them out, one at a
time, and does what the table says. The two ends have what is here in common, and their own actions
beside it, a method ``_do_<action>`` for each.
"""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from xvd.blkif.abi import XenbusState
from xvd.blkif.handshake import (
    WRITES_NODES,
    BackendAction,
    BackendEvent,
    BackendState,
    FrontendAction,
    FrontendEvent,
    FrontendState,
    Step,
)
from xvd.blkif.nodes import NodeChanges, Side, parse_state
from xvd.errors import PeerClosed, PeerProtocolError, XenstoreError, XvdError
from xvd.machine.xs.client import Watch, XenstoreClient
from xvd.xenbus.directory import change_device
from xvd.xenbus.inbox import Inbox, Order, Pace

_S = TypeVar("_S", bound=BackendState | FrontendState)
_E = TypeVar("_E", bound=BackendEvent | FrontendEvent)
_A = TypeVar("_A", bound=BackendAction | FrontendAction)

NO_NODES = NodeChanges({})


def state_in(side: Side, text: str | XenstoreError | None) -> XenbusState:
    """Make sense of what was read of a ``state`` node; UNKNOWN where there is none."""
    try:
        return XenbusState.UNKNOWN if isinstance(text, XenstoreError) else parse_state(side, text)
    except PeerProtocolError:
        return XenbusState.UNKNOWN


class Actor(ABC, Generic[_S, _E, _A]):
    """One device's end. For the event loop's thread.

    path: its directory, relative to this domain. table: where an event leads from a state. log:
    begins each line with the disk.
    """

    def __init__(
        self,
        store: XenstoreClient,
        path: str,
        state: _S,
        table: Callable[[_S, _E], Step[_S, _A]],
        log: logging.LoggerAdapter[logging.Logger],
    ) -> None:
        self.path = path
        self.state: _S = state
        self.lost: PeerClosed | None = None
        """Why there is no store any more."""
        self._store = store
        self._table = table
        self._log = log
        self._inbox: Inbox[_E] = Inbox()
        self._written: XenbusState | None = None
        self._watches: list[Watch] = []
        self._tasks: set[asyncio.Task[None]] = set()

    def put(self, event: _E) -> None:
        """Tell the device something."""
        self._inbox.put(event)

    def poll(self) -> None:
        """Have the nodes read: once, however often this is asked for meanwhile."""
        self._inbox.put(Order.POLL)

    @property
    def waiting(self) -> int:
        """The events that wait to be acted on."""
        return len(self._inbox)

    # ---- What an end has of its own ----

    @abstractmethod
    async def _read_events(self) -> Sequence[_E]:
        """Read what the nodes say now, as events."""

    def _foreign_state(self) -> XenbusState | None:
        """Return what our state node reads when the directory is another device's by now."""
        return None

    # ---- Acting ----

    async def _act_out(self, first: Step[_S, _A]) -> None:
        """Take `first`, then a step for each event, to a final state or until told to leave."""
        await self._take(first)
        while not self.state.final:
            item = await self._inbox.get()
            if item is Order.LEAVE:
                return
            events = await self._read_safely() if isinstance(item, Order) else (item,)
            for event in events:
                if not self.state.final:
                    await self._feed(event)

    async def _feed(self, event: _E) -> None:
        await self._take(self._table(self.state, event))

    async def _read_safely(self) -> Sequence[_E]:
        try:
            return await self._read_events()
        except XenstoreError as error:  # this reading is lost; the next event causes another
            self._log.error("its nodes could not be read: %s", error, event="nodes-unreadable")
            return ()

    async def _take(self, step: Step[_S, _A]) -> None:
        """Go where a step leads and act; the state goes with an action's nodes, or before all."""
        if step.state is not self.state:
            self._log.debug("%s -> %s", self.state.name, step.state.name)
        self.state = step.state
        if not any(action in WRITES_NODES for action in step.actions):
            await self._write(NO_NODES)
        for action in step.actions:
            await getattr(self, f"_do_{action.name.lower()}")()

    async def _do_poll(self) -> None:
        self.poll()

    async def _write(self, changes: NodeChanges, *, always: bool = False) -> bool:
        """Write nodes, with our state if that is another than was written, or `always`.

        False if the device is gone, or the directory another's; nothing is written then.
        """
        state = self.state.xenbus
        if state == self._written and not always:
            state = None
        if state is None and not changes.write and not changes.remove:
            return True
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
        return there

    # ---- Watching ----

    async def _watch(self, path: str) -> Watch:
        """Read the nodes whenever `path` or what is below it changes, and once now."""
        watch = await self._store.watch(path)
        self._watches.append(watch)
        self._spawn(self._follow(watch))
        return watch

    async def _unwatch(self) -> None:
        """Watch nothing any more."""
        while self._watches:
            try:
                await self._watches.pop().close()
            except XvdError as error:
                self._log.debug("a watch is left behind: %s", error)

    async def _follow(self, watch: Watch) -> None:
        pace = Pace(asyncio.get_running_loop().time)
        try:
            async for _ in watch:
                if wait_s := pace.wait_s():
                    await asyncio.sleep(wait_s)
                watch.skip()
                self.poll()
        except PeerClosed as error:  # no store, no toolstack: nobody to serve for
            self.lost = error
            self._inbox.put(Order.LEAVE)

    async def _state_of(self, side: Side, directory: str) -> XenbusState:
        """Return what a ``state`` node says; UNKNOWN where there is none, or no sense."""
        (text,) = await self._store.try_read_each([f"{directory}/state"])
        return state_in(side, text)

    # ---- Work beside the actor ----

    def _spawn(self, work: Awaitable[None]) -> None:
        """Have it done meanwhile; cancelled at the end."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _stop_work(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
