# SPDX-License-Identifier: Apache-2.0
"""Both handshake tables on one model of xenstore, with events in any order, and with either end
dying at any moment."""

from hypothesis import given
from hypothesis import strategies as st

from xvd.blkif.abi import XenbusState
from xvd.blkif.handshake import (
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
)

B, F = BackendState, FrontendState
X = XenbusState


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
            elif action is BackendAction.POLL:
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
            elif action is FrontendAction.POLL:
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
