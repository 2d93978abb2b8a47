# SPDX-License-Identifier: Apache-2.0
"""Disks whose whole life must come to a good end, and some whose must not."""

import asyncio
import struct
from mmap import mmap

import pytest

from xvd.backend.device import Device
from xvd.backend.life import StorageLife
from xvd.backend.state import DiskState, Journal
from xvd.blkif.handshake import BACKEND, BackendState
from xvd.blkif.handshake import BackendEvent as B
from xvd.engines.bridge import Operation
from xvd.engines.live.tracked import Tracked
from xvd.machine.emulated.host import Host
from xvd.machine.emulated.xenstore import XenstoreStore
from xvd.machine.xs.client import Transaction
from xvd.sim.checkers import CheckFailed
from xvd.sim.clock import Clock
from xvd.sim.device_faults import DeviceFaults
from xvd.sim.device_world import DeviceOptions, DeviceWorld
from xvd.sim.engine import SimEngine
from xvd.sim.process import Process
from xvd.sim.storage import SimStorage
from xvd.sim.tool_process import VBD
from xvd.types import DOM0
from xvd.xenbus import actor
from xvd.xenbus.actor import NO_NODES
from xvd.xenbus.links import BackLink


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


def test_canary_a_node_that_is_written_after_the_removal_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unregister = Device._do_unregister

    async def unregister_and_write(device: Device) -> None:
        await unregister(device)
        await asyncio.sleep(2)  # the toolstack has removed everything
        await device._store.write(f"{device.path}/state", "6")

    monkeypatch.setattr(Device, "_do_unregister", unregister_and_write)

    with pytest.raises(CheckFailed, match=r"of a removed disk there is still \['/local/domain/0/"):
        DeviceWorld(calm(1)).run()


def test_canary_a_journal_that_outlives_its_disk_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DiskState, "_remove", lambda state, pattern: None)

    with pytest.raises(CheckFailed, match=r"of a removed disk there is still \['vbd"):
        DeviceWorld(calm(1)).run()


def test_canary_an_error_that_has_no_cause_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    settled = DeviceWorld._settle

    def settle(world: DeviceWorld) -> None:
        error = f"/local/domain/0/error/backend/vbd/1/{VBD.vdev}/error"
        world._tool.spawn(world._tool._client.write(error, "for no reason"))
        settled(world)

    monkeypatch.setattr(DeviceWorld, "_settle", settle)

    with pytest.raises(CheckFailed, match="nothing went wrong: \\['for no reason'\\]"):
        DeviceWorld(calm(1)).run()


@pytest.mark.slow
def test_a_guest_that_is_destroyed_leaves_nothing_and_another_comes() -> None:
    summaries = [DeviceWorld(calm(seed, steps=2500, guest_end=600)).run() for seed in range(3)]

    assert sum(summary.guests for summary in summaries) > 0


def test_canary_what_is_kept_of_a_destroyed_guest_is_missed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def release_all_but_the_ring(link: BackLink) -> None:
        link.queue.release()

    monkeypatch.setattr(BackLink, "release", release_all_but_the_ring)

    with pytest.raises(CheckFailed, match="of a destroyed guest's disk there is not given back"):
        DeviceWorld(calm(1, steps=2500, guest_end=600)).run()


@pytest.mark.slow
def test_storage_that_cannot_be_opened_for_a_while_costs_a_while() -> None:
    for seed in range(5):
        DeviceWorld(calm(seed, steps=2500, no_storage=100, tool=100, back_death=500)).run()


@pytest.mark.slow
def test_canary_storage_that_fails_and_is_not_told_of_is_missed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def say_nothing(device: Device) -> None:
        await device._write(NO_NODES)

    monkeypatch.setattr(Device, "_do_report_error", say_nothing)

    def run_all() -> None:
        for seed in range(10):
            DeviceWorld(calm(seed, steps=2500, no_storage=400, tool=30)).run()

    with pytest.raises(CheckFailed, match="an attach failed without its cause"):
        run_all()


@pytest.mark.slow
def test_canary_a_journal_of_which_a_request_is_forgotten_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find = DiskState.find_journal

    def find_less(*arguments: object) -> Journal | None:
        journal = find(*arguments)  # type: ignore[arg-type]
        if journal is not None:
            forget_one(journal.memory)
        return journal

    monkeypatch.setattr(DiskState, "find_journal", find_less)

    def run_all() -> None:
        for seed in range(40):
            DeviceWorld(calm(seed, steps=2500, back_death=100, spared=50)).run()

    with pytest.raises(CheckFailed, match=r"broke the ring|not within|possible were"):
        run_all()


def forget_one(memory: bytearray | mmap) -> None:
    """As if the first request in flight had been answered: see dataplane/back/journal.pxd."""
    header, entry = struct.Struct("<IIII"), struct.Struct("<I")
    magic, entries, req_cons, rsp_prod = header.unpack_from(memory)
    for number in range(entries):
        at = 128 * (number + 1)
        if entry.unpack_from(memory, at)[0] & 3 == 1:
            entry.pack_into(memory, at, 0)
            header.pack_into(memory, 0, magic, entries, req_cons, rsp_prod + 1)
            return


# ---- Copies ----


def copied(seed: int, **faults: int) -> DeviceOptions:
    """A run in which mirrors and backups come and go, and the backend dies now and then."""
    return calm(seed, **{"steps": 3000, "copy": 40, "back_death": 600, "spared": 20, **faults})


def run_until_found(**faults: int) -> None:
    for seed in range(60):
        DeviceWorld(copied(seed, **faults)).run()


@pytest.mark.slow
def test_a_disk_is_copied_while_both_its_storages_fail_and_everybody_dies() -> None:
    summaries = [
        DeviceWorld(copied(seed, front_death=1200, storage_error=300, hang=600, tool=600)).run()
        for seed in range(10)
    ]

    assert sum(summary.pivots for summary in summaries) > 1
    assert sum(summary.backups for summary in summaries) > 5


@pytest.mark.slow
def test_canary_a_copy_that_is_not_flushed_is_lost_with_the_power(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SimEngine, "flush", lambda engine: None)

    with pytest.raises(CheckFailed, match=r"not any more what it was|possible were"):
        run_until_found(power_loss=600)


@pytest.mark.slow
def test_canary_a_successor_that_does_not_know_of_a_pivot_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def note_nothing(life: StorageLife, image: str, engine: object, undo: object) -> None:
        life._kept.remember("sim 1", "sim 2", "sim 3", *(f"sim {n}" for n in range(4, 100)))

    monkeypatch.setattr(StorageLife, "_note", note_nothing)

    with pytest.raises(CheckFailed, match=r"which took .* place, is|not within"):
        run_until_found()


@pytest.mark.slow
def test_canary_a_change_that_is_not_marked_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tracked, "open_channel", lambda layer: layer.lower.open_channel())

    with pytest.raises(CheckFailed, match=r"not everything is marked|differs from sector"):
        run_until_found()


def test_what_waits_in_its_own_end_is_unwound_with_its_process() -> None:
    async def wait_twice() -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.create_future()
        finally:
            await loop.create_future()

    host = Host()
    host.create_domain(DOM0)
    process = Process(host, XenstoreStore(), Clock(), DOM0)
    task = process.spawn(wait_twice())
    process.loop.round()
    process.kill()

    process.bury()

    assert task.cancelled()
    host.close()
