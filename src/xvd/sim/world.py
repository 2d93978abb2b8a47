# SPDX-License-Identifier: Apache-2.0
"""A world: one frontend, one backend, one disk, and a scheduler that decides who goes next.

Two phases. In the first anything may go wrong that the seed has drawn. In the second nothing does
any more, and everything must come to an end: no operation may be left, nothing mapped, no port
bound. The scheduler draws each step from the seed; the same seed is the same run, step by step,
and its digest proves it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b

from xvd.blkif.abi import Abi
from xvd.dataplane.queue import journal_size
from xvd.machine.emulated.host import Host, Limits
from xvd.machine.emulated.machine import EmulatedMachine
from xvd.machine.xs.client import XenstoreClient
from xvd.sim.checkers import SECTOR, CheckFailed, ModelDisk, check_answered, check_balanced
from xvd.sim.clock import Clock
from xvd.sim.ends import BROKEN, DRAINED, Shape, SimBackend, SimFrontend
from xvd.sim.faults import Faults
from xvd.sim.prng import Prng
from xvd.sim.storage import SimStorage
from xvd.sim.workload import Workload
from xvd.types import Domid

BACK, FRONT = Domid(0), Domid(1)
_LIMITS = Limits(pages=4096, grefs=2048, tracks=1024, ports=64)
_DRAIN_STEPS = 50_000


@dataclass(slots=True)
class Options:
    """Everything that the seed decides before the first step."""

    seed: int
    shape: Shape
    copying: bool
    sectors: int
    depth: int
    sectors_max: int
    budget_max: int
    steps: int
    faults: Faults = field(default_factory=Faults)

    @classmethod
    def draw(cls, seed: int, steps: int) -> "Options":
        """Draw a run's options."""
        prng = Prng(seed)
        return cls(
            seed=seed,
            shape=_draw_shape(prng),
            copying=prng.chance(2),
            sectors=prng.between(64, 2048),
            depth=prng.between(1, 48),
            sectors_max=prng.choose((1, 8, 88, 89, 200, 300)),
            budget_max=prng.choose((1, 2, 64)),
            steps=steps,
            faults=Faults.draw(prng),
        )


def _draw_shape(prng: Prng) -> Shape:
    return Shape(
        abi=prng.choose(tuple(Abi)),
        ring_pages=prng.choose((1, 1, 2, 4)),
        segments_max=prng.choose((11, 11, 12, 32)),
        page_grants=prng.choose((1, 1, 4, 16)),
        pages=prng.choose((1, 50, 352)),
        persistent=prng.chance(2),
        persistent_max=prng.choose((5, 40, 1056)),
        max_pages=prng.choose((0, 40, 1024)),
    )


@dataclass(frozen=True, slots=True)
class Summary:
    """How a run went. digest: of every step taken; equal for equal seeds."""

    finished: int
    failed: int
    deaths: int
    virtual_s: float
    digest: str


class World:
    """One run. Any failed check is a `CheckFailed`.

    make_storage: (generator, bytes) -> storage; a canary puts one in that lies.
    """

    def __init__(
        self, options: Options, make_storage: Callable[[Prng, int], SimStorage] = SimStorage
    ) -> None:
        self.options = options
        self.faults = options.faults
        prng = Prng(options.seed ^ 0x5EED)
        self._prng = prng
        self._clock = Clock()
        self._host = Host(_LIMITS)
        for domid in (BACK, FRONT):
            self._host.create_domain(domid)
        self._model = ModelDisk(options.sectors)
        self._storage = make_storage(prng.fork(), options.sectors * SECTOR)
        self._workload = Workload(
            prng.fork(), self._model, depth=options.depth, sectors_max=options.sectors_max
        )
        self._front = self._new_frontend()
        self._journal = self._new_journal()
        self._back: SimBackend | None = self._new_backend()
        self._front_is_dead = False
        self._deaths = 0
        self._digest = blake2b(digest_size=8)
        self._submitting = True

    # ---- Building ----

    def _machine(self, domid: Domid) -> EmulatedMachine:
        return EmulatedMachine(self._host.open(domid), _no_xenstore)

    def _new_frontend(self) -> SimFrontend:
        return SimFrontend(self._machine(FRONT), self._clock, BACK, self.options.shape)

    def _new_journal(self) -> bytearray:
        """Memory that outlives a backend; a new connection begins with a new one."""
        return bytearray(journal_size(self.options.shape.entries))

    def _new_backend(self) -> SimBackend:
        return SimBackend(
            self._machine(BACK),
            self._clock,
            self._front,
            self._storage.channel,
            capacity=self.options.sectors,
            copying=self.options.copying,
            journal=self._journal,
        )

    # ---- Running ----

    def run(self) -> Summary:
        """Both phases and the end."""
        try:
            for _ in range(self.options.steps):
                self._step()
            self.faults = Faults()
            self._submitting = False
            self._drain()
            self._end()
        finally:
            self._host.close()
        return Summary(
            self._workload.finished,
            self._workload.failed,
            self._deaths,
            self._clock.now_ns / 1e9,
            self._digest.hexdigest(),
        )

    def _drain(self) -> None:
        for _ in range(_DRAIN_STEPS):
            if not self._workload.outstanding and not self._front_is_dead and self._back:
                return
            self._step()
        raise CheckFailed(f"{self._workload.outstanding} operations never come to an end")

    def _end(self) -> None:
        """Close both ends in the order of a clean close; everything must be given back."""
        assert self._back is not None
        self._back.queue.stop()
        while not self._back.step(64) & DRAINED:
            if self._storage.held:
                self._storage.finish_one(0)
        check_answered(self._back.queue.counters())
        self._back.release()
        self._front.die()
        check_balanced(self._host.books())

    def _step(self) -> None:
        """Let one thing happen."""
        self._clock.advance(self._prng.between(100, 5000))
        action = self._prng.weighted(self._possible())
        self._digest.update(action.encode())
        detail = getattr(self, f"_do_{action}")()
        if detail:
            self._digest.update(str(detail).encode())
        self._maybe_die()

    def _possible(self) -> dict[str, int]:
        """What can happen now, with its weight; passing time is all that is left to sleepers."""
        back = self._back
        actions = {
            "submit": 3 if self._submitting and not self._front_is_dead else 0,
            "front": 4 if self._front.awake and not self._front_is_dead else 0,
            "back": 4 if back and back.awake else 0,
            "event_to_front": 3 if not self._front_is_dead and self._pending(self._front) else 0,
            "event_to_back": 3 if back and self._pending(back) else 0,
            "storage": 3 if back and self._storage.held else 0,
            "spurious": 1 if self.faults.spurious_event else 0,
            "scan": 1 if self.options.shape.persistent and not self._front_is_dead else 0,
        }
        idle = ("spurious", "scan")
        if not any(weight for name, weight in actions.items() if name not in idle):
            actions["time_passes"] = 1
        return actions

    def _pending(self, end: SimFrontend | SimBackend) -> bool:
        state = end.machine.state(end.machine.domid)
        return bool(state.port(end.channel.port)[3])

    # ---- What can happen ----

    def _do_submit(self) -> int:
        if self._workload.submit(self._front.queue):
            self._front.wake()
        return self._workload.outstanding

    def _do_front(self) -> int:
        flags = self._front.step(self._prng.between(1, self.options.budget_max))
        if flags & BROKEN:
            raise CheckFailed(f"an honest backend was found lying: {self._front.queue.breach}")
        return self._workload.reap(self._front.queue)

    def _do_back(self) -> int:
        assert self._back is not None
        if self._prng.chance(self.faults.bad_grant):
            self._back.grants.inject([0] * self._prng.below(8) + [-1])
        flags = self._back.step(self._prng.between(1, self.options.budget_max))
        if flags & BROKEN:
            raise CheckFailed("an honest frontend was found lying")
        if flags & DRAINED and self._front_is_dead:
            self._connect_anew()
        return flags

    def _do_event_to_front(self) -> str:
        self._front.channel.consume()
        if self._prng.chance(self.faults.lost_event):
            return "lost"
        self._front.wake()
        return ""

    def _do_event_to_back(self) -> str:
        assert self._back is not None
        self._back.channel.consume()
        if self._prng.chance(self.faults.lost_event):
            return "lost"
        self._back.wake()
        return ""

    def _do_storage(self) -> str:
        assert self._back is not None
        outcome = self._storage.finish_one(self.faults.storage_error)
        self._back.wake()
        return outcome

    def _do_spurious(self) -> None:
        if self._prng.chance(self.faults.spurious_event):
            self._front.wake()
            if self._back is not None:
                self._back.wake()

    def _do_scan(self) -> None:
        """Time for the frontend to look for grants that the backend has dropped."""
        if self._prng.chance(10):
            self._front.queue.scan()
            self._front.wake()

    def _do_time_passes(self) -> int:
        """Everybody sleeps: jump to the first watchdog, or to the successor of a dead backend."""
        if self._back is None:
            self._back = self._new_backend()
            return self._clock.now_ns
        ends = [self._back] if self._front_is_dead else [self._back, self._front]
        first = min(ends, key=lambda end: end.deadline_ns)
        self._clock.jump(first.deadline_ns)
        first.wake()
        return self._clock.now_ns

    # ---- Deaths ----

    def _maybe_die(self) -> None:
        if self._back and not self._front_is_dead:
            if self._prng.chance(self.faults.backend_death):
                self._kill_backend()
            elif self._prng.chance(self.faults.frontend_death):
                self._kill_frontend()
        elif self._back is None and self._prng.chance(20):
            self._back = self._new_backend()

    def _kill_backend(self) -> None:
        assert self._back is not None
        self._deaths += 1
        self._storage.backend_died()
        self._back.die()
        self._back = None

    def _kill_frontend(self) -> None:
        """The backend drains what it has taken; then both begin anew."""
        assert self._back is not None
        self._deaths += 1
        self._workload.reap(self._front.queue)
        self._workload.frontend_died()
        self._front.die()
        self._front_is_dead = True
        self._back.queue.stop()
        self._back.wake()

    def _connect_anew(self) -> None:
        assert self._back is not None
        check_answered(self._back.queue.counters())
        self._back.release()
        self._front = self._new_frontend()
        self._journal = self._new_journal()
        self._back = self._new_backend()
        self._front_is_dead = False


async def _no_xenstore() -> XenstoreClient:
    raise AssertionError("the simulated world has no xenstore")
