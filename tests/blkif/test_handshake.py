# SPDX-License-Identifier: Apache-2.0
"""The handshake tables: each scenario as a story.

A story feeds events and names the states passed through.
"""

from collections.abc import Mapping
from typing import Any

import pytest

from xvd.blkif.abi import XenbusState
from xvd.blkif.handshake import (
    BACKEND,
    FRONTEND,
    TRIES_MAX,
    WRITES_NODES,
    BackendAction,
    BackendEvent,
    BackendState,
    FrontendEvent,
    FrontendState,
    Step,
    backend_event,
    backend_step,
    closed_event,
    foreign_state,
    frontend_event,
    frontend_step,
    initial_backend,
    initial_frontend,
    removal_event,
)

B, F = BackendState, FrontendState
X = XenbusState


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
        "WAITING offer poll",
        "WAITING",
        "CONNECTING connect",
        "CONNECTED publish poll",
        "CONNECTED",
    ]


def test_backend_accepts_a_frontend_that_never_says_initialised() -> None:
    """mini-os, OVMF, U-Boot and Mirage publish their ring and write 4 at once."""
    story = backend_story(B.WAITING, "FRONTEND_CONNECTED", "CONNECT_DONE")

    assert story == ["CONNECTING connect", "CONNECTED publish poll"]


def test_backend_connects_once_for_two_triggers() -> None:
    story = backend_story(B.WAITING, "FRONTEND_INITIALISED", "FRONTEND_CONNECTED", "CONNECT_DONE")

    assert story == ["CONNECTING connect", "CONNECTING", "CONNECTED publish poll"]


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
        "CLOSING",
        "DISCONNECTING disconnect",
        "CLOSED poll",
        "CLOSED",
        "WAITING offer poll",
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
        "WAITING offer poll",
        "CONNECTING connect",
    ]


def test_backend_answers_a_kernel_that_begins_anew_without_closing() -> None:
    story = backend_story(B.CONNECTED, "FRONTEND_INITIALISING", "DISCONNECT_DONE")

    assert story == ["RESETTING disconnect", "WAITING offer poll"]


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
        "REMOVING",
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

    assert story == ["DISCONNECTING disconnect", "CLOSED poll"]


def test_backend_that_cannot_connect_says_so_and_does_not_try_again_by_itself() -> None:
    story = backend_story(
        B.CONNECTING, "CONNECT_FAILED", "FRONTEND_INITIALISED", "FRONTEND_CONNECTED"
    )

    assert story == ["FAILED report_error disconnect poll", "FAILED", "FAILED"]


def test_backend_that_failed_gives_a_new_frontend_its_chance() -> None:
    story = backend_story(B.FAILED, "FRONTEND_INITIALISING", "DISCONNECT_DONE")

    assert story == ["RESETTING disconnect", "WAITING offer poll"]


def test_backend_closes_a_device_whose_ring_is_broken() -> None:
    assert backend_story(B.CONNECTED, "RING_BROKEN") == ["FAILED report_error disconnect poll"]


def test_backend_without_storage_waits_for_removal() -> None:
    story = backend_story(B.STARTING, "STORAGE_FAILED", "FRONTEND_INITIALISING", "REMOVE_ALONE")

    assert story == ["NO_STORAGE report_error poll", "NO_STORAGE", "GONE unregister"]


def test_backend_announces_a_new_size_only_while_connected() -> None:
    assert backend_story(B.CONNECTED, "RESIZED") == ["CONNECTED publish_size"]
    assert backend_story(B.CLOSING, "RESIZED") == ["CLOSING"]


@pytest.mark.parametrize("frontend", [X.INITIALISED, X.CONNECTED])
def test_backend_that_died_connected_attaches_to_the_live_ring(frontend: XenbusState) -> None:
    start = initial_backend(X.CONNECTED, frontend).state

    story = backend_story(start, "FRONTEND_CONNECTED", "STORAGE_READY", "CONNECT_DONE")

    assert story == ["RESUMING", "RECONNECTING reconnect", "CONNECTED publish poll"]


@pytest.mark.parametrize(
    ("own", "frontend"),
    [(X.INITIALISING, X.INITIALISING), (X.CONNECTED, X.CLOSED), (X.CLOSED, X.CONNECTED)],
)
def test_backend_that_finds_no_live_ring_begins_at_the_start(
    own: XenbusState, frontend: XenbusState
) -> None:
    assert initial_backend(own, frontend) == Step(B.STARTING, (BackendAction.POLL,))


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
        "PUBLISHED publish poll",
        "CONNECTING read_features",
        "CONNECTED start_io poll",
    ]


def test_frontend_accepts_a_backend_that_is_connected_before_it() -> None:
    """NetBSD's backend goes to 4 as soon as it has its device."""
    story = frontend_story(F.STARTING, "BACKEND_CONNECTED", "BACKEND_CONNECTED")

    assert story == ["PUBLISHED publish poll", "CONNECTING read_features"]


def test_frontend_reads_the_size_again_when_the_state_is_repeated() -> None:
    assert frontend_story(F.CONNECTED, "BACKEND_CONNECTED") == ["CONNECTED read_size"]


def test_frontend_frees_its_pages_only_after_the_backend_has_closed() -> None:
    story = frontend_story(
        F.CONNECTED, "CLOSE", "BACKEND_CLOSING", "DRAINED", "BACKEND_CLOSING", "BACKEND_CLOSED"
    )

    assert story == [
        "CLOSING stop_io",
        "CLOSING",
        "HANDED_BACK poll",
        "HANDED_BACK",
        "CLOSED release clean_up choose",
    ]


def test_frontend_fails_what_a_vanished_backend_will_not_answer() -> None:
    story = frontend_story(F.CONNECTED, "BACKEND_UNKNOWN", "DRAINED", "BACKEND_UNKNOWN")

    assert story == ["CLOSING fail_io", "HANDED_BACK poll", "CLOSED release clean_up choose"]


def test_frontend_begins_again_with_a_backend_that_forgot_it() -> None:
    assert frontend_story(F.CONNECTED, "BACKEND_INIT_WAIT") == ["PUBLISHED release publish poll"]


def test_frontend_begins_again_after_migration() -> None:
    assert frontend_story(F.CONNECTED, "RESUMED") == ["STARTING find_backend release clean_up poll"]


def test_frontend_gives_up_on_a_backend_that_breaks_the_protocol() -> None:
    assert frontend_story(F.CONNECTED, "BREACH") == ["CLOSING report_error fail_io"]


def test_frontend_leaves_the_disk_as_the_next_driver_expects_it() -> None:
    state = frontend_step(F.CLOSED, FrontendEvent.LEAVE).state

    assert (state, state.xenbus) == (F.VACANT, X.INITIALISING)


@pytest.mark.parametrize(
    ("wanted", "online", "tries", "event"),
    [
        (True, True, 0, "REOPEN"), (True, True, TRIES_MAX - 1, "REOPEN"),
        (True, True, TRIES_MAX, "REFUSED"), (True, False, 0, "REMOVED"), (False, True, 0, "LEAVE"),
    ],
)  # fmt: skip
def test_frontend_that_has_closed_goes_back_or_away(
    wanted: bool, online: bool, tries: int, event: str
) -> None:
    found = closed_event(wanted=wanted, online=online, tries=tries)

    assert found is FrontendEvent[event]


@pytest.mark.parametrize("event", ["NOT_BACK", "UNANSWERED", "ABANDON"])
@pytest.mark.parametrize("state", [state for state in F if not state.final])
def test_frontend_leaves_at_once_from_anywhere_and_writes_nothing(
    state: FrontendState, event: str
) -> None:
    step = frontend_step(state, FrontendEvent[event])

    assert (step, step.state.xenbus) == (Step(F.ABANDONED), None)


def test_frontend_that_is_closed_in_the_middle_of_a_reset_leaves_the_rest_to_the_next() -> None:
    assert frontend_story(F.RESET_CLOSING, "CLOSE") == ["ABANDONED"]
    assert frontend_story(F.RESET_CLOSED, "CLOSE") == ["ABANDONED"]
    assert frontend_story(F.UNFOLLOWED, "CLOSE") == ["ABANDONED"]


@pytest.mark.parametrize(
    ("written", "foreign"),
    [(None, None), (X.INITIALISING, None), (X.INIT_WAIT, X.INITIALISING),
     (X.CLOSED, X.INITIALISING)],
)  # fmt: skip
def test_backend_knows_a_new_disk_by_a_state_that_it_has_left(
    written: XenbusState | None, foreign: XenbusState | None
) -> None:
    assert foreign_state(written) is foreign


@pytest.mark.parametrize("state", [state for state in B if not state.final])
def test_backend_leaves_a_new_disk_of_the_same_name_alone(state: BackendState) -> None:
    step = backend_step(state, BackendEvent.REPLACED)

    assert (step, step.state.xenbus) == (Step(B.REPLACED), None)


def test_frontend_after_a_crash_leads_the_backend_round() -> None:
    step = initial_frontend(X.CONNECTED, X.CONNECTED)

    story = frontend_story(
        step.state, "BACKEND_CONNECTED", "BACKEND_CLOSING", "BACKEND_CLOSED", "BACKEND_INIT_WAIT"
    )

    assert step.state is F.RESET_CLOSING
    assert story == [
        "RESET_CLOSING",
        "RESET_CLOSED arm_timer poll",
        "STARTING clean_up poll",
        "PUBLISHED publish poll",
    ]


def test_frontend_after_a_crash_waits_for_a_backend_that_stays_connected_to_the_dead_one() -> None:
    story = frontend_story(F.RESET_CLOSING, "TIMEOUT", "TIMEOUT", "BACKEND_CONNECTED", "TIMEOUT")

    assert story == ["RESET_CLOSED arm_timer poll", "UNFOLLOWED poll", "UNFOLLOWED", "UNFOLLOWED"]


@pytest.mark.parametrize("state", ["UNKNOWN", "INITIALISING", "INIT_WAIT", "CLOSING", "CLOSED"])
def test_frontend_after_a_crash_goes_on_once_the_backend_is_not_connected_any_more(
    state: str,
) -> None:
    assert frontend_story(F.UNFOLLOWED, f"BACKEND_{state}") == ["STARTING clean_up poll"]


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
    ("table", "states", "entries"),
    [
        (BACKEND, set(B), {B.STARTING, B.RESUMING}),
        (FRONTEND, set(F), {F.STARTING, F.RESET_CLOSING}),
    ],
)
def test_every_state_can_be_entered_and_all_but_the_final_left(
    table: Mapping[Any, Step[Any, Any]], states: set[Any], entries: set[Any]
) -> None:
    moves = [(state, step.state) for (state, _), step in table.items() if step.state is not state]

    assert {to for _, to in moves} | entries == states
    assert {source for source, _ in moves} == {state for state in states if not state.final}


def test_a_step_writes_nodes_once() -> None:
    taken = (
        [step.actions for step in BACKEND.values()],
        [step.actions for step in FRONTEND.values()],
    )

    for actions in (*taken[0], *taken[1]):
        assert len(WRITES_NODES.intersection(actions)) <= 1
