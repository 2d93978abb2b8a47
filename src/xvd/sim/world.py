# SPDX-License-Identifier: Apache-2.0
"""A world: one frontend, one backend, one disk of several queues, and a scheduler that decides who
goes next.

Two phases. In the first anything may go wrong that the seed has drawn. In the second nothing does
any more, and everything must come to an end: no operation may be left, nothing mapped, no port
bound. The scheduler draws each step from the seed; the same seed is the same run, step by step,
and its digest proves it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import TypeVar

from xvd.backend.counters import BackCounters
from xvd.blkif.abi import MAX_SEGMENTS_PER_REQUEST, Abi
from xvd.dataplane.back.journal import journal_size
from xvd.dataplane.types import StepFlag
from xvd.machine.emulated.grants import EmulatedForeignGrants
from xvd.machine.emulated.host import Host
from xvd.machine.emulated.limits import Limits
from xvd.machine.emulated.machine import EmulatedMachine
from xvd.machine.xs.client import XenstoreClient
from xvd.sim.checkers import CheckFailed, ModelDisk, check_answered, check_balanced
from xvd.sim.clock import Clock
from xvd.sim.ends import Shape, SimBackend, SimFrontend, SimLink
from xvd.sim.faults import Faults
from xvd.sim.prng import Prng
from xvd.sim.storage import SimStorage
from xvd.sim.workload import Workload
from xvd.types import Domid

BACK, FRONT = Domid(0), Domid(1)
_LIMITS = Limits(pages=8192, grefs=8192, tracks=4096, ports=64)
_DRAIN_STEPS = 50_000
_SECTORS_MIN, _SECTORS_MAX = 64, 3072
_GRANTS_FAIL = ([-1], [-13], [-13, -13], [-7] * 12)
"""A bad grant; no room to map; nor to copy."""
L = TypeVar("L", bound=SimLink)


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
            shape=draw_shape(prng, prng.choose(tuple(Abi)), prng.choose((1, 1, 4, 16))),
            copying=prng.chance(2),
            sectors=prng.between(_SECTORS_MIN, 2048),
            depth=prng.between(1, 48),
            sectors_max=prng.choose((1, 8, 88, 89, 200, 300)),
            budget_max=prng.choose((1, 2, 64)),
            steps=steps,
            faults=Faults.draw(prng),
        )


def draw_shape(prng: Prng, abi: Abi, page_grants: int) -> Shape:
    """Draw what a guest of this kind and some backend agree on."""
    flush, barrier = prng.choose(((True, True), (True, True), (True, False), (False, True)))
    return Shape(
        abi=abi,
        queues=prng.choose((1, 1, 2, 4)),
        ring_pages=prng.choose((1, 1, 2, 4)),
        segments_max=prng.choose((MAX_SEGMENTS_PER_REQUEST, MAX_SEGMENTS_PER_REQUEST, 12, 32)),
        page_grants=page_grants,
        pages=prng.choose((1, 50, 352)),
        persistent=prng.chance(2),
        persistent_max=prng.choose((5, 40, 1056)),
        max_pages=prng.choose((0, 40, 1024)),
        flush=flush,
        barrier=barrier,
        discard=not prng.chance(4),
    )


def draw_weaker(prng: Prng, shape: Shape) -> Shape:
    """Draw what the same guest agrees on with a backend that offers less of everything."""
    return replace(
        shape,
        queues=prng.between(1, shape.queues),
        ring_pages=min(shape.ring_pages, prng.choose((1, 2))),
        segments_max=MAX_SEGMENTS_PER_REQUEST,
        persistent=False,
        barrier=shape.barrier and not shape.flush,
        discard=False,
    )


@dataclass(frozen=True, slots=True)
class Summary:
    """How a run went. deaths: of either end, or of both when the power failed. digest: of every
    step taken; equal for equal seeds."""

    finished: int
    failed: int
    deaths: int
    replacements: int
    resizes: int
    virtual_s: float
    digest: str

    def __str__(self) -> str:
        return (
            f"{self.finished} operations, {self.failed} failed as they should, "
            f"{self.deaths} deaths, {self.replacements} replacements, {self.resizes} resizes, "
            f"{self.virtual_s:.3f} s of virtual time, digest {self.digest}"
        )


class World:
    """One run. Any failed check is a `CheckFailed`.

    make_storage: (generator, sectors, most sectors) -> storage; a canary puts one in that lies.
    """

    def __init__(
        self, options: Options, make_storage: Callable[[Prng, int, int], SimStorage] = SimStorage
    ) -> None:
        self.options = options
        self.faults = options.faults
        self._shape = options.shape
        self._copying = options.copying
        prng = Prng(options.seed ^ 0x5EED)
        self._prng = prng
        self._clock = Clock()
        self._host = Host(_LIMITS)
        for domid in (BACK, FRONT):
            self._host.create_domain(domid)
        self._model = ModelDisk(options.sectors, _SECTORS_MAX)
        self._storage = make_storage(prng.fork(), options.sectors, _SECTORS_MAX)
        self._workload = Workload(
            prng.fork(), self._model, depth=options.depth, sectors_max=options.sectors_max
        )
        self._front = self._new_frontend()
        self._journals = self._new_journals()
        self._back: SimBackend | None = self._new_backend()
        self._front_is_dead = False
        self._deaths = self._replacements = self._resizes = 0
        self._digest = blake2b(digest_size=8)
        self._submitting = True

    # ---- Building ----

    def _machine(self, domid: Domid) -> EmulatedMachine:
        return EmulatedMachine(self._host.open(domid), _no_xenstore)

    def _new_frontend(self) -> SimFrontend:
        return SimFrontend(self._machine(FRONT), self._clock, BACK, self._shape)

    def _new_journals(self) -> list[bytearray]:
        """A backend's persistent state, in memory."""
        size = journal_size(self._shape.entries)
        return [bytearray(size) for _ in range(self._shape.queues)]

    def _new_backend(self) -> SimBackend:
        return SimBackend(
            self._machine(BACK),
            self._clock,
            self._front,
            self._storage,
            copying=self._copying,
            journals=self._journals,
        )

    # ---- Running ----

    def run(self) -> Summary:
        """Run both phases and the end."""
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
            self._replacements,
            self._resizes,
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
        self._back.stop()
        while not self._back.drained:
            for link in self._back.links:
                link.step(64)
            if self._storage.held:
                self._storage.finish_one(0)
        self._check_answered()
        self._back.release()
        self._front.die()
        check_balanced(self._host.accounting())
        if self._workload.failed and not self.options.faults.may_fail:
            raise CheckFailed(
                f"{self._workload.failed} operations failed though nothing went wrong"
            )

    def _check_answered(self) -> None:
        assert self._back is not None
        for link in self._back.links:
            check_answered(BackCounters.of(link.queue.counters()))

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
        """Return what can happen now, with its weight; for sleepers only time can pass."""
        front = [] if self._front_is_dead else self._front.links
        back = self._back.links if self._back else []
        actions = {
            "submit": 3 if self._submitting and front else 0,
            "front": 4 if _awake(front) else 0,
            "back": 4 if _awake(back) else 0,
            "event_to_front": 3 if self._pending(FRONT, front) else 0,
            "event_to_back": 3 if self._pending(BACK, back) else 0,
            "storage": 3 if back and self._storage.held else 0,
            "news": 1 if front and self._workload.sectors != self._storage.sectors else 0,
            "spurious": 1 if self.faults.spurious_event else 0,
            "scan": 1 if self._shape.persistent and front else 0,
            "resize": 1 if self.faults.resize and back and front else 0,
        }
        idle = ("spurious", "scan", "resize")
        if not any(weight for name, weight in actions.items() if name not in idle):
            actions["time_passes"] = 1
        return actions

    def _pending(self, domid: Domid, links: Sequence[L]) -> list[L]:
        """Return those of an end's queues to which an event is under way."""
        end = self._front if domid == FRONT else self._back
        if not links or end is None:
            return []
        state = end.machine.state(domid)
        return [link for link in links if state.port(link.channel.port)[3]]

    # ---- What can happen ----

    def _do_submit(self) -> int:
        self._workload.submit(self._front)
        return self._workload.outstanding

    def _do_front(self) -> int:
        link = self._prng.choose(_awake(self._front.links))
        flags = link.step(self._prng.between(1, self.options.budget_max))
        if flags & StepFlag.BROKEN:
            raise CheckFailed(f"an honest backend was found lying: {link.queue.breach}")
        return self._workload.reap(self._front)

    def _do_back(self) -> int:
        assert self._back is not None
        link = self._prng.choose(_awake(self._back.links))
        if self._prng.chance(self.faults.bad_grant):
            grants = link.link.grants
            assert isinstance(grants, EmulatedForeignGrants)
            grants.inject([0] * self._prng.below(8) + self._prng.choose(_GRANTS_FAIL))
        flags = link.step(self._prng.between(1, self.options.budget_max))
        if flags & StepFlag.BROKEN:
            raise CheckFailed("an honest frontend was found lying")
        if self._front_is_dead and self._back.drained:
            self._connect_anew()
        return flags

    def _do_event_to_front(self) -> str:
        return self._deliver(self._pending(FRONT, self._front.links))

    def _do_event_to_back(self) -> str:
        assert self._back is not None
        return self._deliver(self._pending(BACK, self._back.links))

    def _deliver(self, pending: Sequence[L]) -> str:
        link = self._prng.choose(pending)
        link.channel.consume()
        if self._prng.chance(self.faults.lost_event):
            return "lost"
        link.wake()
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
        """Let the frontend search for grants that the backend has dropped."""
        if self._prng.chance(10):
            for link in self._front.links:
                link.queue.scan()
            self._front.wake()

    def _do_resize(self) -> int:
        """Larger or smaller; the queues are told in the order of backend/device.py's `resize`."""
        if self._prng.chance(self.faults.resize):
            assert self._back is not None
            sectors = self._prng.between(_SECTORS_MIN, _SECTORS_MAX)
            self._back.set_capacity(min(sectors, self._storage.sectors))
            self._storage.resize(sectors)
            self._model.resize(sectors)
            self._back.set_capacity(sectors)
            self._resizes += 1
        return self._storage.sectors

    def _do_news(self) -> int:
        """The frontend has read the size again."""
        self._workload.sectors = self._storage.sectors
        return self._workload.sectors

    def _do_time_passes(self) -> int:
        """Everybody sleeps: jump to the first watchdog, or to the successor of a dead backend."""
        if self._back is None:
            self._back = self._new_backend()
            return self._clock.now_ns
        front = [] if self._front_is_dead else self._front.links
        first = min((*self._back.links, *front), key=lambda link: link.deadline_ns)
        self._clock.jump(first.deadline_ns)
        first.wake()
        return self._clock.now_ns

    # ---- Deaths ----

    def _maybe_die(self) -> None:
        if self._back and not self._front_is_dead:
            for fault in ("backend_death", "frontend_death", "replacement", "power_loss"):
                if self._prng.chance(getattr(self.faults, fault)):
                    getattr(self, f"_suffer_{fault}")()
                    return
        elif self._back is None and self._prng.chance(20):
            self._back = self._new_backend()

    def _suffer_backend_death(self) -> None:
        assert self._back is not None
        self._deaths += 1
        self._kill_backend()

    def _kill_backend(self) -> None:
        assert self._back is not None
        self._storage.backend_died()
        self._back.die()
        self._back = None

    def _suffer_frontend_death(self) -> None:
        """The backend drains what it has taken; then both begin anew."""
        assert self._back is not None
        self._deaths += 1
        self._workload.reap(self._front)
        self._workload.frontend_died()
        self._front.die()
        self._front_is_dead = True
        self._back.stop()

    def _connect_anew(self) -> None:
        assert self._back is not None
        self._check_answered()
        self._back.release()
        self._begin_connection()
        self._back = self._new_backend()
        self._front_is_dead = False

    def _begin_connection(self) -> None:
        """New rings, and the size as it is now; the backend is to come."""
        self._front = self._new_frontend()
        # A frontend that begins anew while no backend runs finds the journals of the dead one.
        stale, self._journals = self._journals, self._new_journals()
        if self._prng.chance(2) and len(stale) == len(self._journals):
            for journal, old in zip(self._journals, stale, strict=True):
                journal[: len(old)] = old[: len(journal)]
        self._workload.sectors = self._storage.sectors

    def _suffer_replacement(self) -> None:
        """A backend with other features, on new rings; half of them offer less of everything."""
        self._replacements += 1
        self._kill_backend()
        self._workload.reap(self._front)
        self._front.die()
        if self._prng.chance(2):
            self._shape = draw_weaker(self._prng, self._shape)
        else:
            self._shape = draw_shape(self._prng, self._shape.abi, self._shape.page_grants)
        self._copying = self._prng.chance(2)
        self._begin_connection()
        self._workload.go_on(self._front)

    def _suffer_power_loss(self) -> None:
        """Both ends are gone at once; what no flush covers may be gone too."""
        self._deaths += 1
        self._workload.reap(self._front)
        self._workload.frontend_died()
        self._kill_backend()
        self._front.die()
        self._storage.power_lost()
        self._model.power_lost()
        self._begin_connection()


def _awake(links: Sequence[L]) -> list[L]:
    """Return those that have something to do."""
    return [link for link in links if link.awake and not link.drained]


async def _no_xenstore() -> XenstoreClient:
    raise AssertionError("the simulated world has no xenstore")
