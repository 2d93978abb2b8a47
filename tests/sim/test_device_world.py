# SPDX-License-Identifier: Apache-2.0
"""Disks whose whole life must come to a good end, and some whose must not."""

import pytest

from xvd.blkif.handshake import BACKEND, BackendState
from xvd.blkif.handshake import BackendEvent as B
from xvd.engines.bridge import Operation
from xvd.machine.xs.client import Transaction
from xvd.sim.checkers import CheckFailed
from xvd.sim.device_faults import DeviceFaults
from xvd.sim.device_world import DeviceOptions, DeviceWorld
from xvd.sim.storage import SimStorage
from xvd.sim.tool_process import VBD
from xvd.xenbus import actor


@pytest.fixture(autouse=True)
def without_log(caplog: pytest.LogCaptureFixture) -> None:
    """What the drivers tell of thousands of faults is of no use here."""
    caplog.set_level("CRITICAL", "xvd")


@pytest.mark.slow
@pytest.mark.parametrize("twenty", range(5))
def test_twenty_seeds_pass(twenty: int) -> None:
    for seed in range(twenty * 20, twenty * 20 + 20):
        options = DeviceOptions.draw(seed)
        print(options)
        DeviceWorld(options).run()


def calm(seed: int, steps: int = 600, **faults: int) -> DeviceOptions:
    """A short run in which nothing goes wrong but what is said."""
    return DeviceOptions(
        seed=seed, steps=steps, sectors=512, depth=4, sectors_max=88, budget_max=8,
        faults=DeviceFaults(**faults),
    )  # fmt: skip


def test_a_disk_is_used_and_taken_away() -> None:
    summary = DeviceWorld(calm(1)).run()

    assert (summary.finished > 0, summary.failed, summary.deaths) == (True, 0, 0)


@pytest.mark.slow
def test_a_seed_replays_exactly() -> None:
    runs = [DeviceWorld(DeviceOptions.draw(7)).run() for _ in range(2)]

    assert runs[0] == runs[1]
    assert runs[0].digest != DeviceWorld(DeviceOptions.draw(8)).run().digest


class ForgetfulStorage(SimStorage):
    """Acknowledges every write and drops one in four."""

    def perform(self, operation: Operation) -> None:
        if operation.kind != "write" or self._prng.below(4):
            super().perform(operation)


@pytest.mark.slow
def test_canary_a_lost_write_is_found() -> None:
    def run_all() -> None:
        for seed in range(10):
            DeviceWorld(calm(seed, steps=3000), ForgetfulStorage).run()

    with pytest.raises(CheckFailed, match="possible were"):
        run_all()


@pytest.mark.parametrize(
    "row",
    [(BackendState.WAITING, B.FRONTEND_INITIALISED), (BackendState.CONNECTING, B.CONNECT_DONE)],
)
def test_canary_a_backend_that_stops_on_its_way_is_missed(
    row: tuple[BackendState, B], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(BACKEND, row)  # type: ignore[arg-type]

    with pytest.raises(CheckFailed, match="not within 180 s"):
        DeviceWorld(calm(1)).run()


@pytest.mark.slow
def test_canary_a_state_that_is_written_late_brings_a_removed_disk_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def change(store, path, *, state, write=None, remove=(), not_in=None) -> bool:
        async def work(tx: Transaction) -> None:
            for name, value in (write or {}).items():
                await tx.write(f"{path}/{name}", value)
            await tx.write(f"{path}/state", str(int(state or 0)))

        await store.transact(work)
        return True

    monkeypatch.setattr(actor, "change_device", change)

    def run_all() -> None:
        for seed in range(40):
            options = calm(seed, steps=2000, back_death=500, tool=80)
            options.faults.delays_ms = (0, 0, 0, 3000)
            DeviceWorld(options).run()

    with pytest.raises(CheckFailed, match=r"there is still|not within"):
        run_all()


def test_canary_an_error_that_has_no_cause_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    settled = DeviceWorld._settle

    def settle(world: DeviceWorld) -> None:
        error = f"/local/domain/0/error/backend/vbd/1/{VBD.vdev}/error"
        world._tool.spawn(world._tool._client.write(error, "for no reason"))
        settled(world)

    monkeypatch.setattr(DeviceWorld, "_settle", settle)

    with pytest.raises(CheckFailed, match="nothing went wrong: \\['for no reason'\\]"):
        DeviceWorld(calm(1)).run()
