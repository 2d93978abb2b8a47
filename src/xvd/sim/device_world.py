# SPDX-License-Identifier: Apache-2.0
"""A disk's whole life under the scheduler's hand: the shipped backend server, the shipped disk and
the shipped xenstore client and store, each process with an event loop in virtual time.

The scheduler lets one thing happen at a time: a round of a process's event loop, a message to or
from the store, a step of a queue, an event, an operation of the storage, a call that takes its
time; and between them what the toolstack does and what goes wrong.
"""

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path

from xvd.backend.device import Device
from xvd.dataplane.types import StepFlag
from xvd.machine.emulated.host import Host
from xvd.machine.emulated.limits import Limits
from xvd.machine.emulated.xenstore import XenstoreStore
from xvd.sim.back_process import BackProcess
from xvd.sim.checkers import CheckFailed, ModelDisk, check_balanced
from xvd.sim.clock import Clock
from xvd.sim.copy_checks import CopyChecks
from xvd.sim.device_faults import DeviceFaults
from xvd.sim.diskload import DiskLoad
from xvd.sim.front_process import FrontProcess
from xvd.sim.guest import Guest, GuestState
from xvd.sim.prng import Prng
from xvd.sim.process import Process, SteppedRunner
from xvd.sim.storage import MISSING, SimStorage
from xvd.sim.storages import Maker, Storages
from xvd.sim.tool_process import GUEST, ToolProcess
from xvd.types import Domid

BACK = Domid(0)
STEPS = 4000
SERVED_WITHIN_S = 180
"""Virtual seconds after the last fault in which a disk is in use again."""

_LIMITS = Limits(pages=16384, grefs=16384, tracks=8192, ports=64)
_SECTORS_MIN, _SECTORS_MAX = 64, 2048
_SECOND_NS = 1_000_000_000

_WISHES = (
    "attach", "detach", "force", "resize", "resize", "set", "pause", "resume", "resume", "swap",
    "swap", "abandon", "abandon",
)  # fmt: skip
_FAULTS = (
    "back_death", "front_death", "power_loss", "store_loss", "journal", "tool", "no_storage",
    "hang", "guest_end", "copy",
)  # fmt: skip
_COPIES = (
    "mirror", "mirror", "pivot", "pivot", "backup", "incremental", "incremental", "incremental",
    "cancel", "forget",
)  # fmt: skip
_STEPS_IN_A_CALL = 60
"""At most: what others do before a call of the backend's own reaches the storage."""


@dataclass(slots=True)
class DeviceOptions:
    """Everything that the seed decides before the first step."""

    seed: int
    steps: int
    sectors: int
    depth: int
    sectors_max: int
    budget_max: int
    faults: DeviceFaults

    def __str__(self) -> str:
        faults = ", ".join(
            f"{name} 1/{n}" for name, n in asdict(self.faults).items() if n and name != "delays_ms"
        )
        delays = "/".join(str(each) for each in self.faults.delays_ms)
        return (
            f"seed {self.seed}: {self.sectors} sectors, depth {self.depth}, up to "
            f"{self.sectors_max} sectors, budget {self.budget_max}, messages under way for "
            f"{delays} ms, {self.steps} steps; faults: {faults or 'none'}"
        )

    @classmethod
    def draw(cls, seed: int, steps: int = STEPS) -> "DeviceOptions":
        """Draw a run's options."""
        prng = Prng(seed ^ 0xD15C)
        return cls(
            seed=seed,
            steps=steps,
            sectors=prng.between(_SECTORS_MIN, _SECTORS_MAX),
            depth=prng.between(1, 24),
            sectors_max=prng.choose((1, 8, 89, 200)),
            budget_max=prng.choose((1, 8, 64)),
            faults=DeviceFaults.draw(prng),
        )


@dataclass(frozen=True, slots=True)
class DeviceSummary:
    """How a run went. digest: of every step taken; equal for equal seeds."""

    finished: int
    failed: int
    connections: int
    deaths: int
    guests: int
    actions: int
    pivots: int
    backups: int
    virtual_s: float
    digest: str

    def __str__(self) -> str:
        return (
            f"{self.finished} operations, {self.failed} failed as they should, "
            f"{self.connections} connections, {self.deaths} deaths, {self.guests} guests "
            f"destroyed, {self.actions} actions of the toolstack, {self.pivots} moves to a mirror, "
            f"{self.backups} backups, {self.virtual_s:.3f} s of virtual time, digest {self.digest}"
        )


class DeviceWorld:
    """One run. Any failed check is a `CheckFailed`.

    make_storage: as of `Storages`.
    """

    def __init__(
        self,
        options: DeviceOptions,
        make_storage: Maker = SimStorage,
    ) -> None:
        self.options = options
        self.faults = options.faults
        self._prng = prng = Prng(options.seed ^ 0x0DE71CE)
        self._clock = Clock()
        self._host = Host(_LIMITS)
        self._host.create_domain(BACK)
        self._host.create_domain(GUEST)
        self._store = XenstoreStore()
        self._model = ModelDisk(options.sectors, _SECTORS_MAX)
        self._storages = Storages(make_storage, prng.fork(), options.sectors, _SECTORS_MAX)
        self._copies = CopyChecks(self._storages, self._model)
        self._load = DiskLoad(
            prng.fork(), self._model, depth=options.depth, sectors_max=options.sectors_max
        )
        self._directory = tempfile.TemporaryDirectory(prefix="xvd-sim-", dir=_memory())
        self._dead: list[Process] = []
        self._tool = ToolProcess(self._host, self._store, self._clock, BACK)
        self._tool.image = self._storages.image
        self._guest = Guest(self._host, self._tool)
        self._back: BackProcess | None = None
        self._front: FrontProcess | None = None
        self._deaths = self._actions = self._ends = 0
        self._connections = 0
        self._causes = 0
        """What has happened that a driver may report as an error."""
        self._attaching = 0, 0, False
        """The last attach, the causes before it, and whether there was no storage for it."""
        self._digest = blake2b(digest_size=8)
        self._sizes = [options.sectors]
        self._quiet = False
        self._closing = False
        self._in_call = False
        self._found: BaseException | None = None
        """What went wrong while a call of the backend's own was under way."""

    # ---- Running ----

    def run(self) -> DeviceSummary:
        """Run the faulty phase, the quiet one, and the end."""
        try:
            self._run_until(lambda: self._tool.idle)
            for _ in range(self.options.steps):
                self._step()
            self._settle()
            self._end()
        finally:
            self._close()
        return DeviceSummary(
            self._load.finished,
            self._load.failed,
            self._connections,
            self._deaths,
            self._ends,
            self._actions,
            self._copies.pivots,
            self._copies.backups,
            self._clock.now_ns / _SECOND_NS,
            self._digest.hexdigest(),
        )

    def _settle(self) -> None:
        """Let nothing go wrong any more: the disk has to be served, and everything answered."""
        self._quiet = True
        self._storages.missing = False
        self._run_until(lambda: self._tool.idle and self._guest.state is GuestState.RUNNING)
        for _ in range(2):  # a backend that found no storage just before says so later
            self._tool.wish("ensure")
            self._run_until(lambda: self._tool.idle)
        self._run_until(self._is_served)
        self._copies.check_all(self._device)
        self._check_errors()

    def _is_served(self) -> bool:
        front = self._front
        return (
            self._tool.idle
            and front is not None
            and front.connected
            and self._load.outstanding == 0
            and self._tool.states() == ("4", "4")
            and self._back is not None
            and not self._back.halted
            and not self._back.copies
        )

    @property
    def _device(self) -> Device | None:
        return None if self._back is None else self._back.device

    def _check_errors(self) -> None:
        texts = self._tool.errors()
        if texts and not self._causes:
            raise CheckFailed(f"an error is reported and nothing went wrong: {texts}")

    def _end(self) -> None:
        """Take the disk away: nothing of it may stay."""
        self._closing = True
        self._tool.wish("detach")
        self._run_until(lambda: self._tool.idle)
        self._check_left(self._tool.left())
        self._run_until(lambda: self._back is not None and not self._back.serves)
        kept = [path.name for path in Path(self._directory.name).rglob("*") if path.is_file()]
        self._check_left(kept)
        assert self._front is not None
        assert self._back is not None
        self._front.ask_to_end()
        self._back.ask_to_end()
        self._run_until(lambda: self._front is None and self._back is None)
        self._check_left(self._tool.left())
        self._tool.kill()
        check_balanced(self._host.accounting())

    def _check_left(self, left: list[str]) -> None:
        if left:
            raise CheckFailed(f"of a removed disk there is still {left}")

    def _run_until(self, condition: Callable[[], bool]) -> None:
        """Go on without faults until it holds."""
        quiet, self._quiet = self._quiet, True
        limit_ns = self._clock.now_ns + SERVED_WITHIN_S * _SECOND_NS
        while not condition():
            self._step()
            if self._clock.now_ns > limit_ns:
                raise CheckFailed(
                    f"not within {SERVED_WITHIN_S} s: states {self._tool.states()}, "
                    f"{self._load.outstanding} operations outstanding"
                )
        self._quiet = quiet

    def _close(self) -> None:
        for process in self._processes():
            process.kill()
        every = [*self._dead, self._front, self._back, self._tool]
        for dead in filter(None, every):
            dead.bury()
        self._host.close()
        self._directory.cleanup()

    # ---- One thing at a time ----

    def _step(self) -> None:
        self._clock.advance(self._prng.between(100, 5000))
        self._keep_alive()
        action = self._prng.weighted(self._possible())
        self._digest.update(action.encode())
        getattr(self, f"_do_{action}")()
        self._copies.look(self._device)
        self._tool.image = self._storages.image
        if not self._quiet:
            self._maybe_suffer()
        for process in self._processes():
            if process.loop.failures:
                raise process.loop.failures[0]
        if self._found is not None:
            raise self._found
        self._check_refusal()
        if self._tool.removed:
            self._check_left(self._tool.left())

    def _check_refusal(self) -> None:
        """Check that a toolstack whose disk has no storage is told so, where nothing else failed
        since it asked."""
        if self._attaching[0] != self._tool.attaching:
            self._attaching = self._tool.attaching, self._causes, self._storages.missing
        _, causes, missing = self._attaching
        refusal = self._tool.refusal
        if refusal and missing and causes == self._causes and MISSING not in refusal:
            raise CheckFailed(f"an attach failed without its cause: {refusal}")

    def _processes(self) -> list[Process]:
        every = (self._tool, self._back, self._front)
        return [process for process in every if process is not None and process.alive]

    def _runners(self) -> list[SteppedRunner]:
        return [runner for process in self._processes() for runner in process.runners]

    def _possible(self) -> dict[str, int]:
        processes, now = self._processes(), self._clock.now_ns
        due = [link.due_ns for process in processes for link in process.links]
        runners = self._runners()
        actions = {
            "round": 4 if any(process.loop.ready for process in processes) else 0,
            "message": 4 if any(at is not None and at <= now for at in due) else 0,
            "queue": 4 if any(runner.awake for runner in runners) else 0,
            "event": 3 if any(runner.has_event for runner in runners) else 0,
            "call": 3 if any(process.calls for process in processes) else 0,
            "storage": 3 if self._back is not None and self._storages.busy else 0,
            "submit": 2 if self._may_submit() else 0,
        }
        if not any(weight for name, weight in actions.items() if name != "submit"):
            actions["time_passes"] = 1
        return actions

    def _may_submit(self) -> bool:
        return (
            self._front is not None
            and self._front.alive
            and self._front.disk is not None
            and not (self._quiet and self._load.outstanding)
            and self._load.outstanding < self.options.depth
            and not self._closing
        )

    # ---- What can happen ----

    def _do_round(self) -> None:
        ready = [process for process in self._processes() if process.loop.ready]
        self._prng.choose(ready).loop.round()

    def _do_message(self) -> None:
        now = self._clock.now_ns
        links = [link for process in self._processes() for link in process.links]
        due = [link for link in links if link.due_ns is not None and link.due_ns <= now]
        link = self._prng.choose(due)
        link.delay_ns = self.faults.delay_ns(self._prng) if not self._quiet else 0
        if not self._quiet and self._prng.chance(self.faults.conflict):
            link.conflicts = self._prng.between(1, 3)
        self._digest.update(link.deliver().encode())

    def _do_queue(self) -> None:
        runner = self._prng.choose([each for each in self._runners() if each.awake])
        flags = runner.step(self._prng.between(1, self.options.budget_max))
        self._digest.update(bytes([flags & 0xFF]))
        if flags & StepFlag.BROKEN:
            raise CheckFailed(f"{runner.name}: its peer broke the ring")

    def _do_event(self) -> None:
        runner = self._prng.choose([each for each in self._runners() if each.has_event])
        runner.take_event()
        if self._quiet or not self._prng.chance(self.faults.lost_event):
            runner.wake()

    def _do_call(self) -> None:
        process = self._prng.choose([each for each in self._processes() if each.calls])
        process.calls.pop(self._prng.below(len(process.calls)))()

    def _meanwhile(self) -> int:
        """Let others go on while a call of the backend's own is under way; one in how many such
        calls fails."""
        if not self._in_call:
            self._in_call = True
            try:
                for _ in range(self._prng.below(_STEPS_IN_A_CALL)):
                    self._step()
            except BaseException as error:
                self._found = self._found or error
                raise
            finally:
                self._in_call = False
        return 0 if self._quiet else self.faults.storage_error

    def _do_storage(self) -> None:
        error = 0 if self._quiet else self.faults.storage_error
        storage = self._prng.choose(self._storages.busy)
        self._digest.update(storage.finish_one(error).encode())
        for runner in self._back.runners if self._back is not None else ():
            runner.wake()

    def _do_submit(self) -> None:
        assert self._front is not None
        assert self._front.disk is not None
        kind = self._load.begin(self._front.disk, self._front.loop)
        self._digest.update(kind.encode())

    def _do_time_passes(self) -> None:
        """Jump to the first who will have something to do; nobody has now."""
        processes = self._processes()
        due = [process.loop.due_ns for process in processes]
        due += [link.due_ns for process in processes for link in process.links]
        due += [runner.due_ns for runner in self._runners()]
        times = [at for at in due if at is not None]
        if not times and None in (self._back, self._front):
            return  # who is gone has a successor soon
        if not times:
            raise CheckFailed("everybody waits, and for nothing")
        self._clock.jump(min(times))
        for runner in self._runners():
            if not runner.awake and runner.due_ns <= self._clock.now_ns:
                runner.wake()

    # ---- Life and death ----

    def _keep_alive(self) -> None:
        """Give whoever is gone a successor, sooner or later."""
        if self._back is not None and (self._back.over or not self._back.alive):
            self._retire(self._back)
            self._back = None
        if self._front is not None and (self._front.over or not self._front.alive):
            self._retire(self._front)
            self._front = None
        if self._quiet:
            self._storages.revive()
        if self._quiet and self._back is not None:
            self._back.go_on()
        if self._closing:
            return
        if self._guest.state is not GuestState.RUNNING:
            self._guest.go_on(self._back)
        if self._back is None and (self._quiet or self._prng.chance(30)):
            settings = self.faults.draw_settings(self._prng, Path(self._directory.name))
            self._back = BackProcess(self._host, self._store, self._clock, BACK)
            self._back.begin(self._storages, settings, self._resize_storage, self._meanwhile)
        if self._front is None and self._guest.exists and (self._quiet or self._prng.chance(30)):
            self._front = FrontProcess(self._host, self._store, self._clock, GUEST)
            self._front.begin(self.faults.draw_front_settings(self._prng))

    def _retire(self, process: Process) -> None:
        self._connections += process.connections
        if process.alive:
            process.kill()
        self._dead.append(process)

    def _resize_storage(self, storage: SimStorage, sectors: int) -> None:
        storage.resize(sectors)
        if storage is self._storages.disk:
            self._model.resize(sectors)

    def _maybe_suffer(self) -> None:
        in_use = self._front is not None and self._front.connected
        if not in_use and self._prng.below(self.faults.spared):
            return
        for fault in _FAULTS:
            if self._prng.chance(getattr(self.faults, fault)):
                self._digest.update(fault.encode())
                getattr(self, f"_suffer_{fault}")()
                return

    def _suffer_back_death(self) -> None:
        if self._back is not None and self._back.alive:
            self._deaths += 1
            self._causes += 1
            self._storages.backend_died()
            self._back.die()

    def _suffer_front_death(self) -> None:
        if self._front is not None and self._front.alive:
            self._deaths += 1
            self._causes += 1
            self._load.forget()
            self._front.die()

    def _suffer_power_loss(self) -> None:
        if self._back is None or self._front is None:
            return
        self._suffer_front_death()
        self._suffer_back_death()
        self._storages.power_lost()
        self._model.power_lost()
        for path in Path(self._directory.name).rglob("*.changed"):
            path.unlink()  # they count for one run of the host's kernel
        self._copies.check_whole()

    def _suffer_store_loss(self) -> None:
        """Break the daemon's connection to the store; it ends, and another begins."""
        if self._back is not None:
            self._causes += 1
            for link in self._back.links:
                link.cut()

    def _suffer_journal(self) -> None:
        """Lose the journals, or put something else in them, while no backend runs."""
        if self._back is not None and self._back.alive:
            return
        for path in sorted(Path(self._directory.name).rglob("*.ring")):
            self._causes += 1
            if self._prng.chance(2):
                path.unlink()
            else:
                data = bytearray(path.read_bytes())
                data[self._prng.below(len(data))] ^= 1 << self._prng.below(8)
                path.write_bytes(data)

    def _suffer_tool(self) -> None:
        if not self._tool.idle or self._guest.state is not GuestState.RUNNING:
            return
        wish = self._prng.choose(_WISHES)
        self._actions += 1
        if wish in ("attach", "detach", "force"):
            self._causes += wish == "force"
            self._tool.wish(wish)
        elif self._back is not None and self._back.alive:
            self._back.change(wish, self._draw_size(), self._prng)

    def _draw_size(self) -> int:
        """Sectors: a new number, or one that was wished for before."""
        if self._prng.chance(2):
            self._sizes.append(self._prng.between(_SECTORS_MIN, _SECTORS_MAX))
        return self._prng.choose(self._sizes[-2:])

    def _suffer_no_storage(self) -> None:
        """Let whoever opens the storage from now on find none, or find it again."""
        self._storages.missing = not self._storages.missing
        self._causes += 1

    def _suffer_hang(self) -> None:
        """Let the storage end nothing; then an administrator leaves it, or it goes on."""
        self._causes += 1
        if not self._storages.hangs:
            self._storages.hang()
        elif self._back is not None and self._back.alive and not self._prng.chance(4):
            self._back.change("abandon", 0, self._prng)
        else:
            self._storages.revive()

    def _suffer_copy(self) -> None:
        """Have the disk copied, or not any more."""
        if self._back is not None and self._back.alive:
            self._causes += 1
            self._back.change(self._prng.choose(_COPIES), 0, self._prng)

    def _suffer_guest_end(self) -> None:
        """Destroy the guest's domain, whatever the others do."""
        if self._guest.state is not GuestState.RUNNING:
            return
        self._suffer_front_death()
        self._causes += 1
        self._ends += 1
        self._guest.destroy(nodes_too=self._prng.chance(2))


def _memory() -> str | None:
    """Where files are memory, if there is such a place."""
    shm = Path("/dev/shm")
    return str(shm) if shm.is_dir() else None
