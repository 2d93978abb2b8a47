# SPDX-License-Identifier: Apache-2.0
"""How a disk comes up and goes away: both roles' xenbus handshake as tables.

The one idea: a state machine is a dict, ``(our state, event) -> (next state, actions)``, and
nothing in this file acts. A pair that is not in a table changes nothing, which is what makes
repeated, coalesced and late events harmless.

How a caller uses it (`BackendState` and `FrontendState` alike):

1. ``step = initial_backend(own_node, peer_node)``; then, for every event, ``step =
   backend_step(state, event)``. One event at a time: finish 2 before the next one.
2. Take ``step.state`` and do ``step.actions`` in order. At most one of them is marked *nodes*: it
   writes its nodes and ``step.state.xenbus`` in one xenstore transaction, which first checks that
   our own ``state`` node still exists and is not `foreign_state` (else the directory is gone, or
   another disk's: write nothing), and which starts again on EAGAIN. Without such an action the
   state is written first. It is not written when it is None, or what the node says already
   (PUBLISH_SIZE is the exception).
3. CONNECT, RECONNECT, DISCONNECT, READ_FEATURES, STOP_IO and FAIL_IO take time; their end comes
   back as an event, and meanwhile further events are fed. One that is asked for while it runs is
   the one that runs: it ends once.
4. POLL means: read the peer's node (a backend reads its ``online`` node too) and feed what it
   says as an event, as if a watch had fired. So nothing is lost that was ignored while we worked.
5. The disk's way ends in a state that is `final`.

Events of the peer are levels, not edges: on each watch read the node and feed
``frontend_event(value)`` or ``backend_event(value)``. A backend that reads ``online`` as 0 feeds
``removal_event(frontend_node)`` before it. Events that no row names for a state are ignored.

Sources: Linux xen-blkback and xen-blkfront, QEMU's xen-block, libxl, Linux's
``xenbus_probe_frontend.c`` for the reset after kexec; docs/protocol.md has the reasons.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final, Generic, TypeVar

from xvd.blkif.abi import XenbusState

__all__ = [
    "BACKEND",
    "FRONTEND",
    "TRIES_MAX",
    "WRITES_NODES",
    "BackendAction",
    "BackendEvent",
    "BackendState",
    "BackendStep",
    "FrontendAction",
    "FrontendEvent",
    "FrontendState",
    "FrontendStep",
    "Step",
    "backend_event",
    "backend_step",
    "closed_event",
    "foreign_state",
    "frontend_event",
    "frontend_step",
    "initial_backend",
    "initial_frontend",
    "removal_event",
    "stays_online",
]


TRIES_MAX: Final = 5
"""Connections that a backend may refuse in a row; one that cannot would be asked for ever."""


class _State(Enum):
    """A state with the value it gives our ``state`` node; None leaves the node as it is."""

    def __init__(self, _number: int, xenbus: XenbusState | None, final: bool = False) -> None:
        self.xenbus = xenbus
        self.final = final


class BackendState(_State):
    """Where a backend's disk stands. Only `CONNECTED`, `CLOSING` and `REMOVING` may have rings."""

    STARTING = (1, None)
    """The storage is being opened; nothing is offered."""
    ANNOUNCED = (19, XenbusState.INIT_WAIT)
    """The storage is still being opened, but offered: a toolstack does not wait longer for that."""
    NO_STORAGE = (2, XenbusState.CLOSING)
    """The storage could not be opened: said, and nothing more to be done with it."""
    WAITING = (3, XenbusState.INIT_WAIT)
    """Offered; the frontend has not published its rings."""
    CONNECTING = (4, None)
    """Rings are being mapped and ports bound."""
    RESUMING = (5, None)
    """Our predecessor died while connected: the storage is being opened for its live rings."""
    RECONNECTING = (6, None)
    """The live rings are being attached to."""
    CONNECTED = (7, XenbusState.CONNECTED)
    CLOSING = (8, XenbusState.CLOSING)
    """The frontend is closing; what it puts on its rings is served until it has closed."""
    DISCONNECTING = (9, None)
    """Draining and unmapping, to end as CLOSED."""
    RESETTING = (10, None)
    """Draining and unmapping because another frontend is here already, to end as WAITING.
    No Closed in between: a Linux frontend that sees it while initialising closes itself."""
    CLOSED = (11, XenbusState.CLOSED)
    """Ready for a frontend to begin again (``online`` is 1)."""
    FAILED = (12, XenbusState.CLOSING)
    """We gave up on this frontend: said; what it had of ours is being given back."""
    REMOVING = (13, XenbusState.CLOSING)
    """The toolstack removes the disk; its live frontend is closing."""
    LEAVING = (14, XenbusState.CLOSING)
    """Draining and unmapping, to end as GONE."""
    GONE = (15, XenbusState.CLOSED, True)
    """Unregistered: the last write."""
    LOST = (16, XenbusState.CLOSED)
    """A predecessor's storage could not be opened: its frontend's requests get no answer."""
    SPENT = (17, XenbusState.CLOSED)
    """We gave up, and hold nothing any more: Closed tells a frontend with requests outstanding that
    nobody will answer them. Only one that closes, or begins anew, is served again."""
    REPLACED = (18, None, True)
    """The directory is a new disk's by now: nothing in it is ours to write."""


class BackendEvent(Enum):
    """What a backend can learn."""

    FRONTEND_UNKNOWN = auto()
    """The frontend's state node is gone, or reads 0."""
    FRONTEND_INITIALISING = auto()
    FRONTEND_INIT_WAIT = auto()
    FRONTEND_INITIALISED = auto()
    FRONTEND_CONNECTED = auto()
    FRONTEND_CLOSING = auto()
    FRONTEND_CLOSED = auto()
    FRONTEND_RECONFIGURING = auto()
    FRONTEND_RECONFIGURED = auto()
    STORAGE_SLOW = auto()
    """The storage is not open yet, after a time that a toolstack does not wait much longer than."""
    STORAGE_READY = auto()
    """The storage is open."""
    STORAGE_FAILED = auto()
    CONNECT_DONE = auto()
    """CONNECT or RECONNECT has ended well."""
    CONNECT_FAILED = auto()
    """It has not, and has undone itself."""
    DISCONNECT_DONE = auto()
    """DISCONNECT has ended: nothing in flight, nothing mapped, no port bound."""
    RING_BROKEN = auto()
    """A ring's indices make no sense, or something else that only closing can answer."""
    RESIZED = auto()
    """The storage has another size."""
    WITHDRAWN = auto()
    """The storage turned out not to do something that was offered."""
    REMOVE = auto()
    """``online`` is 0, and the frontend's state is 2 to 5: it will close."""
    REMOVE_ALONE = auto()
    """``online`` is 0, and there is no frontend that could close."""
    REPLACED = auto()
    """Our own state node reads `foreign_state`."""


class BackendAction(Enum):
    """What a backend is to do; *nodes* are written with the state, in one transaction."""

    ANNOUNCE = auto()
    """*nodes*: those of OFFER, which do not depend on the storage, and that it is being opened."""
    OFFER = auto()
    """*nodes*: what a frontend must know before it allocates: ring order, queues, indirect."""
    PUBLISH = auto()
    """*nodes*: geometry and all features."""
    PUBLISH_SIZE = auto()
    """*nodes*: ``sectors``, and ``state`` although it does not change: the frontend's watch
    fires and it reads the size again."""
    REPORT_ERROR = auto()
    """*nodes*: the error text, in our own domain's ``error`` directory."""
    CONNECT = auto()
    """Read all of the frontend's keys, map, attach, bind, then serve what is on the rings.
    Ends in CONNECT_DONE or CONNECT_FAILED."""
    RECONNECT = auto()
    """The same for rings that are live: attach at rsp_prod, and kick the frontend once."""
    DISCONNECT = auto()
    """Cancel a CONNECT that runs, drain what is in flight, unmap, unbind; always ends in
    DISCONNECT_DONE, at once when there is nothing to undo."""
    POLL = auto()
    """Read the frontend's state and ``online`` again, and feed them."""
    UNREGISTER = auto()
    """Close the storage, drop the watches, forget the disk."""


class FrontendState(_State):
    """Where a frontend's disk stands."""

    STARTING = (1, XenbusState.INITIALISING)
    """Waits for the backend's offer."""
    PUBLISHED = (2, XenbusState.INITIALISED)
    """Rings are published; waits for the backend to connect."""
    CONNECTING = (3, None)
    """The backend is connected; its features are being read."""
    CONNECTED = (4, XenbusState.CONNECTED)
    CLOSING = (5, XenbusState.CLOSING)
    """No new I/O; what is outstanding is awaited, or failed when the backend is gone."""
    HANDED_BACK = (6, XenbusState.CLOSED)
    """We are done; the backend still has our pages mapped until it is Closed too."""
    CLOSED = (7, XenbusState.CLOSED)
    """Everything is ours again. REOPEN starts anew, LEAVE makes room for another driver."""
    VACANT = (8, XenbusState.INITIALISING, True)
    """Left as the next driver expects to find it; the end."""
    RESET_CLOSING = (9, XenbusState.CLOSING)
    """Our predecessor died connected: first of three steps that bring the backend round."""
    RESET_CLOSED = (10, XenbusState.CLOSED)
    """The second step; the third is STARTING."""
    ABANDONED = (11, None, True)
    """Left at once, the nodes as they are: the next driver begins with a reset."""
    UNFOLLOWED = (12, XenbusState.CLOSED)
    """The backend has not closed in time. While it reads Connected, it is so to our predecessor,
    whose rings it may still answer: it, or its successor, is waited for."""


class FrontendEvent(Enum):
    """What a frontend can learn."""

    BACKEND_UNKNOWN = auto()
    """The backend's state node is gone, or reads 0."""
    BACKEND_INITIALISING = auto()
    BACKEND_INIT_WAIT = auto()
    BACKEND_INITIALISED = auto()
    BACKEND_CONNECTED = auto()
    BACKEND_CLOSING = auto()
    BACKEND_CLOSED = auto()
    BACKEND_RECONFIGURING = auto()
    BACKEND_RECONFIGURED = auto()
    FEATURES_READ = auto()
    FEATURES_BAD = auto()
    """What the backend published is out of range."""
    BREACH = auto()
    """A response that no backend may send: the device is lost."""
    CLOSE = auto()
    """Our user wants no more of the disk."""
    DRAINED = auto()
    """Nothing is outstanding any more: answered, or failed."""
    RESUMED = auto()
    """We run in a new domain after migration, or our own state node reads `foreign_state`: the
    toolstack has made the directory anew, and old grants and ports are void."""
    TIMEOUT = auto()
    """The timer of a reset step ran out."""
    REOPEN = auto()
    """After CLOSED: use the disk again."""
    LEAVE = auto()
    """After CLOSED: leave the disk to whoever comes, as our user wishes, or after a failure."""
    REMOVED = auto()
    """After CLOSED: the toolstack takes the disk away."""
    REFUSED = auto()
    """After CLOSED: the backend has refused `TRIES_MAX` connections in a row."""
    NOT_BACK = auto()
    """The backend has closed, and not come back in time."""
    UNANSWERED = auto()
    """The backend owes answers, and has given none for longer than our user would wait."""
    ABANDON = auto()
    """Our user leaves at once, as a process that dies does."""


class FrontendAction(Enum):
    """What a frontend is to do; *nodes* are written with the state, in one transaction."""

    PUBLISH = auto()
    """Read the offer, allocate rings and ports; *nodes*: stale keys removed, ours written."""
    CLEAN_UP = auto()
    """*nodes*: every key that we have written is removed, for a successor who knows fewer."""
    READ_FEATURES = auto()
    """Read all that the backend published, ending in FEATURES_READ or FEATURES_BAD."""
    START_IO = auto()
    """Offer the disk, put again what was outstanding before, kick once."""
    READ_SIZE = auto()
    """Read ``sectors`` again: the backend repeats its state when the size has changed."""
    STOP_IO = auto()
    """No new requests; await those outstanding; ends in DRAINED."""
    FAIL_IO = auto()
    """No new requests; fail those outstanding, nobody will answer; ends in DRAINED."""
    RELEASE = auto()
    """End the grants and free the ports; pages that are still mapped are freed later."""
    REPORT_ERROR = auto()
    """*nodes*: the error text, in our own domain's ``error`` directory."""
    ARM_TIMER = auto()
    """Five seconds, then TIMEOUT; armed anew for each step."""
    POLL = auto()
    """Read the backend's state again, and feed it."""
    FIND_BACKEND = auto()
    """Read who serves the disk, and watch its state from now on: it may be another backend."""
    CHOOSE = auto()
    """Feed what `closed_event` says."""
    AWAIT_RETURN = auto()
    """Half a minute, then NOT_BACK; until the next START_IO."""


WRITES_NODES: Final = frozenset(
    {
        BackendAction.ANNOUNCE,
        BackendAction.OFFER,
        BackendAction.PUBLISH,
        BackendAction.PUBLISH_SIZE,
        BackendAction.REPORT_ERROR,
        FrontendAction.PUBLISH,
        FrontendAction.CLEAN_UP,
        FrontendAction.REPORT_ERROR,
    }
)
"""The actions that are marked *nodes*."""

_S = TypeVar("_S", bound=BackendState | FrontendState)
_E = TypeVar("_E", bound=BackendEvent | FrontendEvent)
_A = TypeVar("_A", bound=BackendAction | FrontendAction)


@dataclass(frozen=True, slots=True)
class Step(Generic[_S, _A]):
    """Where an event leads: the state to be in, and what to do in this order."""

    state: _S
    actions: tuple[_A, ...] = ()


BackendStep = Step[BackendState, BackendAction]
FrontendStep = Step[FrontendState, FrontendAction]


class _Table(dict[tuple[_S, _E], Step[_S, _A]]):
    """A table while it is written down."""

    def row(self, sources: list[_S], events: list[_E], to: Step[_S, _A]) -> None:
        """Each of `events` leads each of `sources` to `to`."""
        for source in sources:
            for event in events:
                assert (source, event) not in self, f"{source} and {event} have a row already"
                self[source, event] = to


_BackendTable = _Table[BackendState, BackendEvent, BackendAction]
_FrontendTable = _Table[FrontendState, FrontendEvent, FrontendAction]


def _backend_table() -> _BackendTable:
    table = _BackendTable()
    _serve_frontends(table)
    _give_up(table)
    return table


def _serve_frontends(table: _BackendTable) -> None:
    """Rows for frontends that come, go and return, and for storage that works."""
    s, e, a = BackendState, BackendEvent, BackendAction
    row = table.row
    gone = [e.FRONTEND_UNKNOWN, e.FRONTEND_CLOSED]
    fresh = [e.FRONTEND_INITIALISING]
    # Minimal frontends (mini-os, OVMF, U-Boot) never write 3, the others write 3 and then 4.
    ready = [e.FRONTEND_INITIALISED, e.FRONTEND_CONNECTED]
    disconnect = (a.DISCONNECT,)

    # Coming up.
    opening = [s.STARTING, s.ANNOUNCED, s.NO_STORAGE]
    row([s.STARTING], [e.STORAGE_SLOW], Step(s.ANNOUNCED, (a.ANNOUNCE,)))
    row(opening, [e.STORAGE_READY], Step(s.WAITING, (a.OFFER, a.POLL)))
    row([s.WAITING], ready, Step(s.CONNECTING, (a.CONNECT,)))
    row([s.CONNECTING, s.RECONNECTING], [e.CONNECT_DONE], Step(s.CONNECTED, (a.PUBLISH, a.POLL)))
    row([s.CONNECTED], [e.RESIZED], Step(s.CONNECTED, (a.PUBLISH_SIZE,)))
    # The state is not repeated, as in blkback: the answer tells this frontend, the node the next.
    row([s.CONNECTED], [e.WITHDRAWN], Step(s.CONNECTED, (a.PUBLISH,)))

    # Taking over from a predecessor that died; a frontend that left meanwhile has no live ring.
    row([s.RESUMING], [e.STORAGE_READY], Step(s.RECONNECTING, (a.RECONNECT,)))
    # One that is closing waits for its last answers: the rings are taken up first, then polled.
    row([s.RESUMING], [*gone, *fresh], Step(s.STARTING))

    # The frontend closes. Rings stay mapped at 5: an earlier teardown lost I/O (Linux did that).
    row([s.CONNECTED], [e.FRONTEND_CLOSING], Step(s.CLOSING))
    row([s.CONNECTING], [e.FRONTEND_CLOSING], Step(s.CLOSING, disconnect))
    row([s.WAITING], [e.FRONTEND_CLOSING], Step(s.CLOSING))
    active = [s.WAITING, s.CONNECTING, s.RECONNECTING, s.CONNECTED, s.CLOSING, s.FAILED]
    row(active, gone, Step(s.DISCONNECTING, disconnect))
    row([s.RESETTING], gone, Step(s.DISCONNECTING))
    row([s.DISCONNECTING], [e.DISCONNECT_DONE], Step(s.CLOSED, (a.POLL,)))

    # A frontend begins anew: after a close, after kexec, or so fast that we never saw it close.
    row([s.CLOSED], [*fresh, *ready], Step(s.WAITING, (a.OFFER, a.POLL)))
    busy = [s.CONNECTING, s.RECONNECTING, s.CONNECTED, s.CLOSING, s.FAILED]
    row(busy, fresh, Step(s.RESETTING, disconnect))
    row([s.CLOSING], ready, Step(s.RESETTING, disconnect))
    row([s.DISCONNECTING], [*fresh, *ready], Step(s.RESETTING))
    row([s.RESETTING], [e.DISCONNECT_DONE], Step(s.WAITING, (a.OFFER, a.POLL)))


def _give_up(table: _BackendTable) -> None:
    """Rows for what cannot go on, and for disks that the toolstack takes away."""
    s, e, a = BackendState, BackendEvent, BackendAction
    row = table.row
    disconnect = (a.DISCONNECT,)
    remove = [e.REMOVE, e.REMOVE_ALONE]
    bad = [e.STORAGE_FAILED, e.RING_BROKEN, e.CONNECT_FAILED]
    active = [s.WAITING, s.CONNECTING, s.RECONNECTING, s.CONNECTED, s.CLOSING, s.FAILED]
    unregister = Step(s.GONE, (a.UNREGISTER,))

    # The process and the other disks go on.
    opening = [s.STARTING, s.ANNOUNCED]
    row(opening, [e.STORAGE_FAILED], Step(s.NO_STORAGE, (a.REPORT_ERROR, a.POLL)))
    row([s.RESUMING], [e.STORAGE_FAILED], Step(s.LOST, (a.REPORT_ERROR, a.POLL)))
    row([s.LOST], remove, unregister)
    failed = Step(s.FAILED, (a.REPORT_ERROR, a.DISCONNECT, a.POLL))
    row([s.CONNECTING, s.RECONNECTING], bad, failed)
    row([s.CONNECTED, s.CLOSING], [e.STORAGE_FAILED, e.RING_BROKEN], failed)
    row([s.FAILED], [e.DISCONNECT_DONE], Step(s.SPENT, (a.POLL,)))
    row([s.SPENT], [e.FRONTEND_UNKNOWN, e.FRONTEND_CLOSED], Step(s.CLOSED))
    row([s.SPENT], [e.FRONTEND_INITIALISING], Step(s.WAITING, (a.OFFER, a.POLL)))
    row([s.SPENT], remove, unregister)

    # The toolstack removes the disk: a live frontend closes first, else nobody would end it.
    row([*opening, s.NO_STORAGE, s.RESUMING, s.CLOSED], [e.REMOVE_ALONE], unregister)
    row([*opening, s.NO_STORAGE, s.CLOSED], [e.REMOVE], unregister)
    row([s.CONNECTED, s.CLOSING, s.FAILED, s.WAITING], [e.REMOVE], Step(s.REMOVING))
    row([s.CONNECTING], [e.REMOVE], Step(s.REMOVING, disconnect))
    left = [e.FRONTEND_UNKNOWN, e.FRONTEND_CLOSED, e.FRONTEND_INITIALISING]
    row([s.REMOVING], left, Step(s.LEAVING, disconnect))
    row([s.REMOVING], [e.RING_BROKEN, e.STORAGE_FAILED], Step(s.REMOVING, disconnect))
    row([*active, s.REMOVING], [e.REMOVE_ALONE], Step(s.LEAVING, disconnect))
    row([s.DISCONNECTING, s.RESETTING], remove, Step(s.LEAVING))
    row([s.LEAVING], [e.DISCONNECT_DONE], unregister)
    row([state for state in s if not state.final], [e.REPLACED], Step(s.REPLACED))


def _frontend_table() -> _FrontendTable:
    table = _FrontendTable()
    _use_backends(table)
    _leave(table)
    return table


def _use_backends(table: _FrontendTable) -> None:
    """Rows for backends that come, go and return."""
    s, e, a = FrontendState, FrontendEvent, FrontendAction
    row = table.row
    gone = [e.BACKEND_UNKNOWN, e.BACKEND_CLOSED]
    running = [s.PUBLISHED, s.CONNECTING, s.CONNECTED]

    # Coming up. NetBSD's backend is at 4 before we are here: publish, then read it again.
    offered = [e.BACKEND_INIT_WAIT, e.BACKEND_CONNECTED]
    row([s.STARTING], offered, Step(s.PUBLISHED, (a.PUBLISH, a.POLL)))
    row([s.PUBLISHED], [e.BACKEND_CONNECTED], Step(s.CONNECTING, (a.READ_FEATURES,)))
    row([s.CONNECTING], [e.FEATURES_READ], Step(s.CONNECTED, (a.START_IO, a.POLL)))
    row([s.CONNECTED], [e.BACKEND_CONNECTED], Step(s.CONNECTED, (a.READ_SIZE,)))

    # The ring is lost but the disk is not: everything is negotiated again from the start.
    again = (a.RELEASE, a.PUBLISH, a.POLL)
    row([s.CONNECTING, s.CONNECTED], [e.BACKEND_INIT_WAIT], Step(s.PUBLISHED, again))
    anew = (a.FIND_BACKEND, a.RELEASE, a.CLEAN_UP, a.POLL)
    row(running, [e.RESUMED], Step(s.STARTING, anew))
    same = [s.STARTING, s.CLOSED, s.RESET_CLOSING, s.RESET_CLOSED, s.UNFOLLOWED]
    for state in same:
        row([state], [e.RESUMED], Step(state, (a.FIND_BACKEND, a.POLL)))

    # Going down, by either end. Pages are ours again only when the backend has closed.
    stop, fail = Step(s.CLOSING, (a.STOP_IO,)), Step(s.CLOSING, (a.FAIL_IO,))
    row(running, [e.BACKEND_CLOSING, e.CLOSE], stop)
    row([s.STARTING], [e.CLOSE], Step(s.CLOSED, (a.CHOOSE,)))
    row([*running, s.CLOSING], gone, fail)
    # A backend at 1 or 2 has no ring of ours: what is outstanding gets no answer from it.
    row([s.CLOSING], [e.BACKEND_INITIALISING, e.BACKEND_INIT_WAIT], fail)
    row([s.CLOSING], [e.RESUMED], Step(s.CLOSING, (a.FIND_BACKEND, a.FAIL_IO)))
    row([s.CONNECTING], [e.FEATURES_BAD], Step(s.CLOSING, (a.REPORT_ERROR, a.FAIL_IO)))
    row([*running, s.CLOSING], [e.BREACH], Step(s.CLOSING, (a.REPORT_ERROR, a.FAIL_IO)))
    row([s.CLOSING], [e.DRAINED], Step(s.HANDED_BACK, (a.POLL,)))
    # 1 and 2 say that a new backend is here: it has nothing of ours mapped either.
    freed = [*gone, e.BACKEND_INITIALISING, e.BACKEND_INIT_WAIT]
    tidied = (a.RELEASE, a.CLEAN_UP, a.CHOOSE)
    row([s.HANDED_BACK], freed, Step(s.CLOSED, tidied))
    row([s.HANDED_BACK], [e.RESUMED], Step(s.CLOSED, (a.FIND_BACKEND, *tidied)))
    row([s.CLOSED], [e.REOPEN], Step(s.STARTING, (a.AWAIT_RETURN, a.POLL)))

    # After a crash of our predecessor: the steps of Linux's xenbus reset, each with its time-out.
    # A backend still at InitWait is led round too: it may be about to map the dead one's rings.
    closing = [e.BACKEND_CLOSING, *gone, e.TIMEOUT]
    row([s.RESET_CLOSING], closing, Step(s.RESET_CLOSED, (a.ARM_TIMER, a.POLL)))
    begin = Step(s.STARTING, (a.CLEAN_UP, a.POLL))
    row([s.RESET_CLOSED], gone, begin)
    # Linux goes on here, and takes a Connected that nobody has written for it for the answer.
    row([s.RESET_CLOSED], [e.TIMEOUT], Step(s.UNFOLLOWED, (a.POLL,)))
    row([s.UNFOLLOWED], [*freed, e.BACKEND_INITIALISED, e.BACKEND_CLOSING], begin)


def _leave(table: _FrontendTable) -> None:
    """Rows for the end: in order, or at once."""
    s, e = FrontendState, FrontendEvent
    row = table.row
    row([s.CLOSED], [e.LEAVE, e.REMOVED, e.REFUSED], Step(s.VACANT))
    row([s.STARTING], [e.BACKEND_UNKNOWN], Step(s.ABANDONED))
    # Nothing of ours is published yet: the next driver begins again where this one did.
    row([s.RESET_CLOSING, s.RESET_CLOSED, s.UNFOLLOWED], [e.CLOSE], Step(s.ABANDONED))
    at_once = [e.NOT_BACK, e.UNANSWERED, e.ABANDON]
    row([state for state in s if not state.final], at_once, Step(s.ABANDONED))


BACKEND: Final[Mapping[tuple[BackendState, BackendEvent], BackendStep]] = _backend_table()
"""The backend's table; what it does not name changes nothing."""

FRONTEND: Final[Mapping[tuple[FrontendState, FrontendEvent], FrontendStep]] = _frontend_table()
"""The frontend's table; what it does not name changes nothing."""


def backend_step(state: BackendState, event: BackendEvent) -> BackendStep:
    """Return where `event` leads a backend that is in `state`."""
    return BACKEND.get((state, event), Step(state))


def frontend_step(state: FrontendState, event: FrontendEvent) -> FrontendStep:
    """Return where `event` leads a frontend that is in `state`."""
    return FRONTEND.get((state, event), Step(state))


def frontend_event(node: XenbusState) -> BackendEvent:
    """The event for a backend that reads `node` as its frontend's state."""
    return BackendEvent[f"FRONTEND_{node.name}"]


def backend_event(node: XenbusState) -> FrontendEvent:
    """The event for a frontend that reads `node` as its backend's state."""
    return FrontendEvent[f"BACKEND_{node.name}"]


def removal_event(frontend_node: XenbusState) -> BackendEvent:
    """The event for a backend that reads ``online`` as 0 while its frontend stands at `node`."""
    live = XenbusState.INIT_WAIT <= frontend_node <= XenbusState.CLOSING
    return BackendEvent.REMOVE if live else BackendEvent.REMOVE_ALONE


def stays_online(text: str | None) -> bool:
    """Whether the backend's ``online`` node says that the disk stays; None: it is not there."""
    return text is not None and text.strip(" \t\r\n\0") != "0"


def foreign_state(written: XenbusState | None) -> XenbusState | None:
    """Return our state node's value once the toolstack has made it anew, for who wrote `written`.

    The toolstack removes the nodes of a disk that reads Closed, and may add them anew, while we are
    on our way from there to another state; a new disk's begin with Initialising.
    """
    begun = written not in (None, XenbusState.UNKNOWN, XenbusState.INITIALISING)
    return XenbusState.INITIALISING if begun else None


def closed_event(*, wanted: bool, online: bool, tries: int) -> FrontendEvent:
    """Which way leads from CLOSED: away for good, or back for the next backend.

    wanted: neither has our user closed the disk, nor anything failed. online: the backend's
    directory is there and not being removed. tries: connections refused in a row.
    """
    if not wanted:
        return FrontendEvent.LEAVE
    if tries >= TRIES_MAX:
        return FrontendEvent.REFUSED
    return FrontendEvent.REOPEN if online else FrontendEvent.REMOVED


def initial_backend(own: XenbusState, frontend: XenbusState) -> BackendStep:
    """Where a backend begins that finds its own node at `own` and the frontend's at `frontend`.

    Both at 4 (or the frontend at 3, about to see our 4; or at 5, waiting for its last answers) is
    a predecessor that died under a running guest: its rings are live and are attached to. The
    caller opens the storage in any case, and feeds what came of it.
    """
    live = XenbusState.INITIALISED <= frontend <= XenbusState.CLOSING
    resume = own is XenbusState.CONNECTED and live
    start = BackendState.RESUMING if resume else BackendState.STARTING
    return Step(start, (BackendAction.POLL,))


def initial_frontend(own: XenbusState, backend: XenbusState) -> FrontendStep:
    """Where a frontend begins that finds its own node at `own` and the backend's at `backend`.

    An own node beyond Initialising was written by a predecessor that did not clean up; the
    backend may have its rings mapped, so it is led through Closing and Closed first, from where
    it stands.
    """
    poll = FrontendAction.POLL
    timer = FrontendAction.ARM_TIMER
    if own in (XenbusState.UNKNOWN, XenbusState.INITIALISING):
        return Step(FrontendState.STARTING, (poll,))
    if backend in (XenbusState.UNKNOWN, XenbusState.INITIALISING, XenbusState.CLOSED):
        return Step(FrontendState.STARTING, (FrontendAction.CLEAN_UP, poll))
    if own is XenbusState.CLOSED or backend is XenbusState.CLOSING:
        return Step(FrontendState.RESET_CLOSED, (timer, poll))
    return Step(FrontendState.RESET_CLOSING, (timer, poll))
