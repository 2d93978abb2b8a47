# SPDX-License-Identifier: Apache-2.0
"""The handshake tables: each scenario as a story, then both roles against each other.

A story feeds events and names the states passed through. The last part runs both tables on one
model of xenstore, with events in any order, and with either end dying at any moment.
"""

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xvd.blkif.abi import XenbusState
from xvd.blkif.handshake import (
    BACKEND,
    FRONTEND,
    BackendAction,
    BackendEvent,
    BackendState,
    FrontendAction,
    FrontendEvent,
    FrontendState,
    Step,
    backend_event,
    backend_step,
    frontend_event,
    frontend_step,
    initial_backend,
    initial_frontend,
    removal_event,
    render_diagram,
    render_table,
)

B, F = BackendState, FrontendState
X = XenbusState
NODES = {"OFFER", "PUBLISH", "PUBLISH_SIZE", "REPORT_ERROR", "CLEAN_UP"}


def backend_story(start: BackendState, *events: str) -> list[str]:
    """The states that `events` lead through, each with the actions taken on entering it."""
    state, story = start, []
    for event in events:
        step = backend_step(state, BackendEvent[event])
        state = step.state
        story.append(" ".join([state.name, *(action.name.lower() for action in step.actions)]))
    return story


def frontend_story(start: FrontendState, *events: str) -> list[str]:
    """As `backend_story`."""
    state, story = start, []
    for event in events:
        step = frontend_step(state, FrontendEvent[event])
        state = step.state
        story.append(" ".join([state.name, *(action.name.lower() for action in step.actions)]))
    return story


def test_backend_comes_up_with_an_ordinary_frontend() -> None:
    story = backend_story(
        B.STARTING,
        "STORAGE_READY",
        "FRONTEND_INITIALISING",
        "FRONTEND_INITIALISED",
        "CONNECT_DONE",
        "FRONTEND_CONNECTED",
    )

    assert story == [
        "WAITING offer look",
        "WAITING",
        "CONNECTING connect",
        "CONNECTED publish look",
        "CONNECTED",
    ]


def test_backend_accepts_a_frontend_that_never_says_initialised() -> None:
    """mini-os, OVMF, U-Boot and Mirage publish their ring and write 4 at once."""
    story = backend_story(B.WAITING, "FRONTEND_CONNECTED", "CONNECT_DONE")

    assert story == ["CONNECTING connect", "CONNECTED publish look"]


def test_backend_connects_once_for_two_triggers() -> None:
    story = backend_story(B.WAITING, "FRONTEND_INITIALISED", "FRONTEND_CONNECTED", "CONNECT_DONE")

    assert story == ["CONNECTING connect", "CONNECTING", "CONNECTED publish look"]


def test_backend_keeps_rings_until_the_frontend_has_closed() -> None:
    story = backend_story(
        B.CONNECTED,
        "FRONTEND_CLOSING",
        "FRONTEND_CLOSED",
        "DISCONNECT_DONE",
        "FRONTEND_CLOSED",
        "FRONTEND_INITIALISING",
    )

    assert story == [
        "CLOSING stop_taking",
        "DISCONNECTING disconnect",
        "CLOSED look",
        "CLOSED",
        "WAITING offer look",
    ]


def test_backend_follows_a_frontend_that_closes_and_returns_at_once() -> None:
    """Windows closes before each connect: 6, 1 and 3 may all be there before we are done."""
    story = backend_story(
        B.CONNECTED,
        "FRONTEND_CLOSED",
        "FRONTEND_INITIALISED",
        "DISCONNECT_DONE",
        "FRONTEND_INITIALISED",
    )

    assert story == [
        "DISCONNECTING disconnect",
        "RESETTING",
        "WAITING offer look",
        "CONNECTING connect",
    ]


def test_backend_answers_a_kernel_that_begins_anew_without_closing() -> None:
    story = backend_story(B.CONNECTED, "FRONTEND_INITIALISING", "DISCONNECT_DONE")

    assert story == ["RESETTING disconnect", "WAITING offer look"]


def test_backend_answers_each_step_of_a_crash_kernel() -> None:
    """Each step that goes unanswered costs the guest five seconds."""
    state, shown = B.CONNECTED, []
    steps = ("FRONTEND_CLOSING", "FRONTEND_CLOSED", "DISCONNECT_DONE", "FRONTEND_INITIALISING")

    for event in steps:
        state = backend_step(state, BackendEvent[event]).state
        shown.append(state.xenbus)

    assert shown == [X.CLOSING, None, X.CLOSED, X.INIT_WAIT]


def test_backend_removed_under_a_live_frontend_waits_for_it() -> None:
    story = backend_story(
        B.CONNECTED, "REMOVE", "FRONTEND_CLOSING", "REMOVE", "FRONTEND_CLOSED", "DISCONNECT_DONE"
    )

    assert story == [
        "REMOVING",
        "REMOVING stop_taking",
        "REMOVING",
        "LEAVING disconnect",
        "GONE unregister",
    ]


@pytest.mark.parametrize("state", [B.WAITING, B.CONNECTED, B.CLOSING, B.FAILED, B.REMOVING])
def test_backend_removed_without_a_frontend_closes_by_itself(state: BackendState) -> None:
    story = backend_story(state, "REMOVE_ALONE", "DISCONNECT_DONE")

    assert story == ["LEAVING disconnect", "GONE unregister"]


@pytest.mark.parametrize("state", [B.STARTING, B.NO_STORAGE, B.CLOSED, B.RESUMING])
def test_backend_without_rings_goes_at_once(state: BackendState) -> None:
    assert backend_story(state, "REMOVE_ALONE") == ["GONE unregister"]


def test_backend_tears_down_when_the_frontends_node_is_gone() -> None:
    story = backend_story(B.CONNECTED, "FRONTEND_UNKNOWN", "DISCONNECT_DONE")

    assert story == ["DISCONNECTING disconnect", "CLOSED look"]


def test_backend_that_cannot_connect_says_so_and_does_not_try_again_by_itself() -> None:
    story = backend_story(
        B.CONNECTING, "CONNECT_FAILED", "FRONTEND_INITIALISED", "FRONTEND_CONNECTED"
    )

    assert story == ["FAILED report_error disconnect look", "FAILED", "FAILED"]


def test_backend_that_failed_gives_a_new_frontend_its_chance() -> None:
    story = backend_story(B.FAILED, "FRONTEND_INITIALISING", "DISCONNECT_DONE")

    assert story == ["RESETTING disconnect", "WAITING offer look"]


def test_backend_closes_a_device_whose_ring_is_broken() -> None:
    assert backend_story(B.CONNECTED, "RING_BROKEN") == ["FAILED report_error disconnect look"]


def test_backend_without_storage_waits_for_removal() -> None:
    story = backend_story(B.STARTING, "STORAGE_FAILED", "FRONTEND_INITIALISING", "REMOVE_ALONE")

    assert story == ["NO_STORAGE report_error look", "NO_STORAGE", "GONE unregister"]


def test_backend_announces_a_new_size_only_while_connected() -> None:
    assert backend_story(B.CONNECTED, "RESIZED") == ["CONNECTED publish_size"]
    assert backend_story(B.CLOSING, "RESIZED") == ["CLOSING"]


@pytest.mark.parametrize("frontend", [X.INITIALISED, X.CONNECTED])
def test_backend_that_died_connected_attaches_to_the_live_ring(frontend: XenbusState) -> None:
    start = initial_backend(X.CONNECTED, frontend).state

    story = backend_story(start, "FRONTEND_CONNECTED", "STORAGE_READY", "CONNECT_DONE")

    assert story == ["RESUMING", "RECONNECTING reconnect", "CONNECTED publish look"]


@pytest.mark.parametrize(
    ("own", "frontend"),
    [(X.INITIALISING, X.INITIALISING), (X.CONNECTED, X.CLOSED), (X.CLOSED, X.CONNECTED)],
)
def test_backend_that_finds_no_live_ring_begins_at_the_start(
    own: XenbusState, frontend: XenbusState
) -> None:
    assert initial_backend(own, frontend) == Step(B.STARTING, (BackendAction.LOOK,))


@pytest.mark.parametrize(
    ("frontend", "event"),
    [(state, "REMOVE" if 2 <= state <= 5 else "REMOVE_ALONE") for state in X],
)
def test_a_removal_is_lonely_when_no_frontend_could_close(
    frontend: XenbusState, event: str
) -> None:
    assert removal_event(frontend).name == event


def test_frontend_comes_up() -> None:
    story = frontend_story(
        F.STARTING,
        "BACKEND_INITIALISING",
        "BACKEND_INIT_WAIT",
        "BACKEND_CONNECTED",
        "FEATURES_READ",
    )

    assert story == [
        "STARTING",
        "PUBLISHED publish look",
        "CONNECTING read_features",
        "CONNECTED start_io look",
    ]


def test_frontend_accepts_a_backend_that_is_connected_before_it() -> None:
    """NetBSD's backend goes to 4 as soon as it has its device."""
    story = frontend_story(F.STARTING, "BACKEND_CONNECTED", "BACKEND_CONNECTED")

    assert story == ["PUBLISHED publish look", "CONNECTING read_features"]


def test_frontend_reads_the_size_again_when_the_state_is_repeated() -> None:
    assert frontend_story(F.CONNECTED, "BACKEND_CONNECTED") == ["CONNECTED read_size"]


def test_frontend_frees_its_pages_only_after_the_backend_has_closed() -> None:
    story = frontend_story(
        F.CONNECTED, "CLOSE", "BACKEND_CLOSING", "DRAINED", "BACKEND_CLOSING", "BACKEND_CLOSED"
    )

    assert story == [
        "CLOSING stop_io",
        "CLOSING",
        "HANDED_BACK look",
        "HANDED_BACK",
        "CLOSED release clean_up",
    ]


def test_frontend_fails_what_a_vanished_backend_will_not_answer() -> None:
    story = frontend_story(F.CONNECTED, "BACKEND_UNKNOWN", "DRAINED", "BACKEND_UNKNOWN")

    assert story == ["CLOSING fail_io", "HANDED_BACK look", "CLOSED release clean_up"]


def test_frontend_begins_again_with_a_backend_that_forgot_it() -> None:
    assert frontend_story(F.CONNECTED, "BACKEND_INIT_WAIT") == ["PUBLISHED release publish look"]


def test_frontend_begins_again_after_migration() -> None:
    assert frontend_story(F.CONNECTED, "RESUMED") == ["STARTING release clean_up look"]


def test_frontend_gives_up_on_a_backend_that_breaks_the_protocol() -> None:
    assert frontend_story(F.CONNECTED, "BREACH") == ["CLOSING report_error fail_io"]


def test_frontend_leaves_the_disk_as_the_next_driver_expects_it() -> None:
    state = frontend_step(F.CLOSED, FrontendEvent.LEAVE).state

    assert (state, state.xenbus) == (F.VACANT, X.INITIALISING)


def test_frontend_after_a_crash_leads_the_backend_round() -> None:
    step = initial_frontend(X.CONNECTED, X.CONNECTED)

    story = frontend_story(
        step.state, "BACKEND_CONNECTED", "BACKEND_CLOSING", "BACKEND_CLOSED", "BACKEND_INIT_WAIT"
    )

    assert step.state is F.RESET_CLOSING
    assert story == [
        "RESET_CLOSING",
        "RESET_CLOSED arm_timer look",
        "STARTING clean_up look",
        "PUBLISHED publish look",
    ]


def test_frontend_after_a_crash_goes_on_when_a_backend_does_not_answer() -> None:
    story = frontend_story(F.RESET_CLOSING, "TIMEOUT", "TIMEOUT", "TIMEOUT")

    assert story == ["RESET_CLOSED arm_timer look", "STARTING clean_up look", "STARTING"]


@pytest.mark.parametrize(
    ("own", "backend", "state"),
    [
        (X.INITIALISING, X.CONNECTED, F.STARTING),
        (X.INITIALISING, X.INIT_WAIT, F.STARTING),
        (X.CONNECTED, X.CLOSING, F.RESET_CLOSED),
        (X.CONNECTED, X.CLOSED, F.STARTING),
        (X.CLOSED, X.CONNECTED, F.RESET_CLOSED),
        (X.INITIALISED, X.INIT_WAIT, F.RESET_CLOSING),
    ],
)
def test_frontend_enters_the_reset_where_the_backend_stands(
    own: XenbusState, backend: XenbusState, state: FrontendState
) -> None:
    assert initial_frontend(own, backend).state is state


def test_an_event_that_no_row_names_changes_nothing() -> None:
    assert backend_step(B.GONE, BackendEvent.FRONTEND_CONNECTED) == Step(B.GONE)
    assert frontend_step(F.VACANT, FrontendEvent.BACKEND_INIT_WAIT).state is F.VACANT


def test_every_xenbus_state_is_an_event_for_the_other_side() -> None:
    events = {frontend_event(state) for state in X}, {backend_event(state) for state in X}

    assert [len(one) for one in events] == [9, 9]


@pytest.mark.parametrize(
    ("table", "states", "entries", "end"),
    [
        (BACKEND, set(B), {B.STARTING, B.RESUMING}, B.GONE),
        (FRONTEND, set(F), {F.STARTING, F.RESET_CLOSING}, F.VACANT),
    ],
)
def test_every_state_can_be_entered_and_all_but_the_last_left(
    table: Mapping[Any, Step[Any, Any]], states: set[Any], entries: set[Any], end: Any
) -> None:
    moves = [(state, step.state) for (state, _), step in table.items() if step.state is not state]

    assert {to for _, to in moves} | entries == states
    assert {source for source, _ in moves} == states - {end}


def test_a_step_writes_nodes_once() -> None:
    taken = (
        [step.actions for step in BACKEND.values()],
        [step.actions for step in FRONTEND.values()],
    )

    for actions in (*taken[0], *taken[1]):
        assert len(NODES.intersection(action.name for action in actions)) <= 1


def test_tables_are_drawn() -> None:
    assert "| WAITING (2) | FRONTEND_INITIALISED, FRONTEND_CONNECTED | CONNECTING | CONNECT |" in (
        render_table(BACKEND)
    )
    assert "    CLOSED --> STARTING: REOPEN" in render_diagram(FRONTEND)


class World:
    """Both roles over one store: every write wakes the peer, work ends when the schedule says.

    `ring` is the frontend's published ring, `mapped` the one that the backend has mapped.
    """

    def __init__(self, schedule: list[int]) -> None:
        self.schedule = schedule
        self.online = True
        self.nodes = {"backend": X.INITIALISING, "frontend": X.INITIALISING}
        self.rings = 0
        self.ring: int | None = None
        self.mapped: int | None = None
        self.timeouts = 0
        self.jobs: list[str] = []
        self.start_frontend()
        self.start_backend()

    def start_backend(self) -> None:
        self.jobs = [job for job in self.jobs if not job.startswith("b:")]
        self.mapped = None
        self.backend = initial_backend(self.nodes["backend"], self.nodes["frontend"]).state
        self.jobs += ["b:look", "b:STORAGE_READY"]

    def start_frontend(self) -> None:
        self.jobs = [job for job in self.jobs if not job.startswith("f:")]
        step = initial_frontend(self.nodes["frontend"], self.nodes["backend"])
        self.frontend = step.state
        self.apply_frontend(step)

    def job(self, name: str) -> None:
        if name not in self.jobs:
            self.jobs.append(name)

    def write(self, side: str, state: XenbusState | None) -> None:
        if state is not None and self.nodes[side] is not state:
            self.nodes[side] = state
            self.job("f:look" if side == "backend" else "b:look")

    def feed_backend(self, event: BackendEvent) -> None:
        step = backend_step(self.backend, event)
        self.backend = step.state
        self.write("backend", step.state.xenbus)
        for action in step.actions:
            if action in (BackendAction.CONNECT, BackendAction.RECONNECT):
                self.job("b:CONNECT_DONE")
            elif action is BackendAction.DISCONNECT:
                self.jobs = [job for job in self.jobs if job != "b:CONNECT_DONE"]
                self.job("b:DISCONNECT_DONE")
            elif action is BackendAction.LOOK:
                self.job("b:look")

    def feed_frontend(self, event: FrontendEvent) -> None:
        step = frontend_step(self.frontend, event)
        self.frontend = step.state
        self.apply_frontend(step)

    def apply_frontend(self, step: Step[FrontendState, FrontendAction]) -> None:
        for action in step.actions:
            if action is FrontendAction.PUBLISH:
                self.rings += 1
                self.ring = self.rings
            elif action is FrontendAction.RELEASE:
                self.ring = None
            elif action is FrontendAction.READ_FEATURES:
                self.job("f:FEATURES_READ")
            elif action in (FrontendAction.STOP_IO, FrontendAction.FAIL_IO):
                self.job("f:DRAINED")
            elif action is FrontendAction.LOOK:
                self.job("f:look")
        self.write("frontend", step.state.xenbus)

    def run(self, steps: int | None = None) -> None:
        """Do that many jobs, or all of them; the timer of a reset is the last resort."""
        done = 0
        while steps is None or done < steps:
            done += 1
            assert done < 500, "the two ends never come to rest"
            if not self.jobs:
                if self.frontend not in (F.RESET_CLOSING, F.RESET_CLOSED):
                    return
                self.timeouts += 1
                self.feed_frontend(FrontendEvent.TIMEOUT)
                continue
            pick = self.schedule.pop() if self.schedule else 0
            self.do(self.jobs.pop(pick % len(self.jobs)))

    def do(self, job: str) -> None:
        side, name = job.split(":")
        if side == "f":
            event = backend_event(self.nodes["backend"])
            self.feed_frontend(event if name == "look" else FrontendEvent[name])
        elif name == "look":
            if not self.online:
                self.feed_backend(removal_event(self.nodes["frontend"]))
            self.feed_backend(frontend_event(self.nodes["frontend"]))
        else:
            if name == "CONNECT_DONE":
                self.mapped = self.ring
            elif name == "DISCONNECT_DONE":
                self.mapped = None
            self.feed_backend(BackendEvent[name])

    def remove(self) -> None:
        """As libxl does: ``online`` 0, and ``state`` 5 unless the backend is closed."""
        self.online = False
        if self.nodes["backend"] is not X.CLOSED:
            self.write("backend", X.CLOSING)
        self.job("b:look")


SCHEDULES = st.lists(st.integers(0, 5), max_size=60)
EARLY = st.integers(0, 14)


@given(schedule=SCHEDULES)
def test_both_ends_connect_in_any_order_of_events(schedule: list[int]) -> None:
    world = World(schedule)

    world.run()

    assert (world.backend, world.frontend) == (B.CONNECTED, F.CONNECTED)
    assert world.mapped == world.ring


@given(schedule=SCHEDULES, early=EARLY)
def test_a_disk_closed_at_any_moment_can_be_used_again(schedule: list[int], early: int) -> None:
    world = World(schedule)
    world.run(early)

    world.feed_frontend(FrontendEvent.CLOSE)
    world.run()

    assert (world.backend, world.frontend) == (B.CLOSED, F.CLOSED)
    assert (world.mapped, world.ring) == (None, None)
    world.feed_frontend(FrontendEvent.REOPEN)
    world.run()
    assert (world.backend, world.frontend) == (B.CONNECTED, F.CONNECTED)


@given(schedule=SCHEDULES, early=EARLY)
def test_a_disk_removed_at_any_moment_goes(schedule: list[int], early: int) -> None:
    world = World(schedule)
    world.run(early)

    world.remove()
    world.run()

    assert (world.backend, world.mapped) == (B.GONE, None)
    assert world.frontend in (F.CLOSED, F.STARTING)


@given(schedule=SCHEDULES, early=EARLY)
def test_a_frontend_that_dies_at_any_moment_is_succeeded(schedule: list[int], early: int) -> None:
    world = World(schedule)
    world.run(early)

    world.start_frontend()
    world.run()

    assert (world.backend, world.frontend) == (B.CONNECTED, F.CONNECTED)
    assert world.mapped == world.ring
    assert world.timeouts == 0


@given(schedule=SCHEDULES, early=EARLY)
def test_a_backend_that_dies_at_any_moment_is_succeeded(schedule: list[int], early: int) -> None:
    world = World(schedule)
    world.run(early)

    world.start_backend()
    world.run()

    assert (world.backend, world.frontend) == (B.CONNECTED, F.CONNECTED)
    assert world.mapped == world.ring


@given(schedule=SCHEDULES, early=EARLY, later=EARLY)
def test_a_backend_that_dies_while_its_disk_is_removed_still_lets_it_go(
    schedule: list[int], early: int, later: int
) -> None:
    world = World(schedule)
    world.run(early)
    world.remove()
    world.run(later)

    world.start_backend()
    world.run()

    assert (world.backend, world.mapped) == (B.GONE, None)
    assert world.frontend in (F.CLOSED, F.STARTING)
