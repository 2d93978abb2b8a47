# SPDX-License-Identifier: Apache-2.0
"""A backend with a process for each guest: real processes, killed."""

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from qemu_img import run_qemu_img
from rig_disk import run, until
from standstill import stand_still
from verified_load import advances, contents_of, load
from xvd_process import Daemon, as_by_the_unit, run_xvd

from xvd.cli.asking import ask
from xvd.errors import PeerClosed
from xvd.frontend.disk import Disk
from xvd.machine.emulated.service import connect
from xvd.types import Domid

pytestmark = pytest.mark.slow

SIZE = 8 << 20
XVDA = 51712


class Host:
    """An emulated host whose backend has a process for each guest, in a directory."""

    def __init__(self, place: Path, *options: str) -> None:
        self.place = place
        self.directory = place / "host"
        self.log = place / "backend.log"
        self._options = options
        self.host = Daemon("host", str(self.directory))
        self.backend = self.start_backend()

    def start_backend(self) -> Daemon:
        words = ("backend", "--host", str(self.directory), "--isolation", "guest", *self._options)
        with self.log.open("a") as log:
            self.backend = Daemon(*words, stderr=log, by=as_by_the_unit())
        return self.backend

    def image(self, name: str) -> Path:
        image = self.place / name
        image.touch()
        os.truncate(image, SIZE)
        return image

    def qcow2(self, requires_tool: Callable[[str], str]) -> Path:
        requires_tool("qemu-storage-daemon")
        image = self.place / "b.qcow2"
        run_qemu_img(requires_tool("qemu-img"), "create", "-q", "-f", "qcow2", image, SIZE)
        return image

    def attach(self, guest: int) -> Path:
        """Give a guest a disk; its image."""
        image = self.image(f"{guest}.img")
        self.run("attach", str(guest), f"vdev=xvda,target={image}")
        return image

    def run(self, *words: str) -> str:
        """What a verb says that succeeds."""
        done = run_xvd(*words, "--host", str(self.directory))
        assert done.returncode == 0, done.stderr
        return done.stdout

    @asynccontextmanager
    async def disk(self, guest: int) -> AsyncIterator[Disk]:
        machine = connect(self.directory, Domid(guest))
        store = await machine.xenstore()
        async with await Disk.open(machine, store, f"device/vbd/{XVDA}") as disk:
            yield disk
        await store.close()
        machine.close()

    def template(self) -> int:
        """The process that forks workers: the only child of the backend."""
        main = self.backend.process.pid
        return int(Path(f"/proc/{main}/task/{main}/children").read_text())

    async def told(self, guest: int) -> dict[str, Any]:
        """What the supervisor tells of the process that serves a guest, once there is one."""
        while True:
            for one in await ask(self.directory / "control/backend-0", "workers"):
                if one["domains"] == [guest] and one["pid"] is not None:
                    return dict(one)
            await asyncio.sleep(0)

    async def worker(self, guest: int) -> int:
        """The process that serves a guest."""
        return int((await self.told(guest))["pid"])

    def __enter__(self) -> "Host":
        return self

    def __exit__(self, *_: object) -> None:
        self.backend.kill()
        self.host.kill()


@pytest.fixture
def two(tmp_path: Path) -> "Host":
    with Host(tmp_path) as host:
        for guest in (1, 2):
            host.attach(guest)
        yield host


def ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_each_guest_has_a_process(two: Host) -> None:
    async def work() -> None:
        async with two.disk(1) as one, two.disk(2) as other:
            await asyncio.gather(one.write(0, b"1" * 512), other.write(0, b"2" * 512))
            workers = {await two.worker(1), await two.worker(2)}
            assert len(workers | {two.backend.process.pid}) == 3

    run(work())
    figures = json.loads(two.run("stats", "--json"))
    assert {name: [disk["disk"] for disk in disks] for name, disks in figures.items()} == {
        "backend-0": [], "backend-0-1": ["1/xvda"], "backend-0-2": ["2/xvda"],
    }  # fmt: skip


def test_what_a_guests_process_says_is_in_the_daemons_log(tmp_path: Path) -> None:
    async def work(host: Host) -> None:
        async with host.disk(1) as disk:
            await disk.read(0, 512)

    with Host(tmp_path, "-v") as host:
        host.attach(1)
        run(work(host), 60)
        host.backend.stop()
        assert "xvd: INFO: 1/xvda: connected (x86_64-abi" in host.log.read_text()


def test_the_list_of_disks_asks_each_guests_process(two: Host) -> None:
    two.run("pause", "1", "xvda")
    stand_still(asyncio.run(two.worker(2)))

    listed = run_xvd("list", "--json", "--host", str(two.directory))

    assert listed.returncode == 1
    assert [(row["backend_state"], row["daemon"]) for row in json.loads(listed.stdout)] == [
        ("paused", "alive"), ("init_wait", "hung"),
    ]  # fmt: skip
    assert listed.stderr == "xvd: backend-0-2 does not answer within 3 s\n"


def test_a_worker_that_is_killed_costs_its_guest_time_and_another_guest_nothing(two: Host) -> None:
    async def work() -> None:
        async with two.disk(1) as one, two.disk(2) as other:
            contents = [*contents_of(one, SIZE, 2), *contents_of(other, SIZE, 2)]
            stop = asyncio.Event()
            using = asyncio.ensure_future(load(contents, stop))
            survivor = await two.worker(2)
            for _ in range(5):
                await advances(contents, 20)
                os.kill(await two.worker(1), signal.SIGKILL)
            await advances(contents, 20)
            stop.set()
            await using
            assert await two.worker(2) == survivor

    run(work(), 120)


def test_workers_end_with_their_supervisor_and_another_goes_on(two: Host) -> None:
    async def work() -> None:
        async with two.disk(1) as disk:
            await disk.write(0, b"before".ljust(512, b"."))
            before = await two.worker(1)
            two.backend.kill()
            await until(lambda: ended(before))
            await asyncio.to_thread(two.start_backend)
            assert await disk.read(0, 512) == b"before".ljust(512, b".")
            assert await two.worker(1) != before

    run(work(), 60)


def test_all_end_when_asked_to_and_leave_nothing_of_theirs(two: Host) -> None:
    workers = asyncio.run(two.worker(1)), asyncio.run(two.worker(2))

    assert two.backend.stop() == 0

    assert [ended(pid) for pid in workers] == [True, True]
    assert list((two.directory / "control").iterdir()) == []


def test_what_is_set_holds_for_guests_that_come_later(tmp_path: Path) -> None:
    with Host(tmp_path) as host:
        host.run("set", "max_queues=3")
        host.attach(1)

        values = json.loads(host.run("set", "--json"))

        assert {name: each["max_queues"] for name, each in values.items()} == {
            "backend-0": 3, "backend-0-1": 3,
        }  # fmt: skip


def test_a_guest_without_a_disk_has_no_process_for_long(tmp_path: Path) -> None:
    async def work(host: Host) -> None:
        pid = await host.worker(1)
        await asyncio.to_thread(host.run, "detach", "1", "xvda")
        await until(lambda: ended(pid), 30)
        assert await ask(host.directory / "control/backend-0", "workers") == []

    with Host(tmp_path) as host:
        host.attach(1)
        run(work(host), 60)


@pytest.mark.parametrize(
    "options",
    [("--group", "gold:total_iops_sec=5"), ("--set", "group_name=gold"),
     ("--set", "1/xvda:group_name=gold")],
)  # fmt: skip
def test_limits_that_guests_share_need_one_process_for_them(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    done = run_xvd("backend", "--host", str(tmp_path), "--isolation", "guest", *options)

    said = "gold: disks of several guests share limits only where one process serves them all"
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"xvd: {said}: xvd backend --isolation shared\n"


def test_a_setting_that_is_refused_reaches_no_worker(tmp_path: Path) -> None:
    with Host(tmp_path) as host:
        refused = run_xvd("set", "max_queues=9999", "--host", str(host.directory))
        assert (refused.returncode, refused.stdout) == (2, "")
        assert refused.stderr == "xvd: max_queues is 9999; it goes from 0 to 1024\n"

        host.attach(1)

        assert set(json.loads(host.run("stats", "--json"))) == {"backend-0", "backend-0-1"}


def test_no_worker_outlives_its_supervisor_though_the_template_stands_still(two: Host) -> None:
    async def work() -> None:
        workers = await two.worker(1), await two.worker(2)
        stand_still(two.template())
        two.backend.kill()
        await until(lambda: all(map(ended, workers)))

    run(work(), 60)


def test_the_backend_ends_with_its_template(two: Host) -> None:
    os.kill(two.template(), signal.SIGKILL)

    assert two.backend.process.wait(30) == 1


def test_sockets_of_killed_workers_go_with_their_guests(two: Host) -> None:
    worker = asyncio.run(two.worker(1))
    two.backend.kill()
    run(until(lambda: ended(worker)), 30)
    for guest in ("1", "2"):
        two.run("detach", guest, "xvda", "--force")

    two.start_backend()

    assert [path.name for path in (two.directory / "control").iterdir()] == ["backend-0"]


def test_a_number_that_passes_to_another_guest_is_served_by_that_ones_process(
    tmp_path: Path,
) -> None:
    async def guest_is(host: Host, domain: int, guest: str) -> None:
        machine = connect(host.directory, Domid(0))
        async with await machine.xenstore() as store:
            await store.write(f"/local/domain/{domain}/vm", f"/vm/{guest}")
        machine.close()

    async def served(host: Host, worker: str) -> list[str]:
        try:
            return [one["disk"] for one in await ask(host.directory / "control" / worker, "stats")]
        except PeerClosed:
            return []

    async def work(host: Host) -> None:
        for domain in (1, 2):  # one guest, as it migrates within its host
            await guest_is(host, domain, "a")
            await asyncio.to_thread(host.attach, domain)
        await asyncio.to_thread(host.run, "detach", "1", "xvda")

        await guest_is(host, 1, "b")
        await asyncio.to_thread(host.attach, 1)

        while await served(host, "backend-0-2") != ["2/xvda"]:
            pass
        while await served(host, "backend-0-1") != ["1/xvda"]:
            pass

    with Host(tmp_path) as host:
        run(work(host), 60)


def granted(host: Host, guest: int) -> Any:
    """What is kept of the images that an administrator has named."""
    file = host.directory / f"state/backend-0/granted-{guest}"
    with contextlib.suppress(FileNotFoundError):
        return json.loads(file.read_bytes())
    return None


def test_a_confined_worker_opens_what_an_administrator_names(two: Host) -> None:
    other = two.image("other.img")

    async def work() -> None:
        async with two.disk(1) as disk:
            await asyncio.to_thread(two.run, "swap", "1", "xvda", str(other))
            await disk.write(0, b"swapped".ljust(512, b"."))
            worker = await two.told(1)
            assert worker["confined"]
            os.kill(worker["pid"], signal.SIGKILL)
            assert await disk.read(0, 512) == b"swapped".ljust(512, b".")
            assert granted(two, 1) == {"1/51712": [str(other)]}
            await asyncio.to_thread(two.run, "swap", "1", "xvda", str(two.place / "1.img"))
            assert granted(two, 1) == {"1/51712": [str(two.place / "1.img")]}

    run(work(), 60)
    assert other.read_bytes()[:7] == b"swapped"


def test_what_was_named_is_known_after_a_restart_and_forgotten_with_the_disk(two: Host) -> None:
    other = two.image("other.img")

    async def work() -> None:
        async with two.disk(1) as disk:
            await asyncio.to_thread(two.run, "swap", "1", "xvda", str(other))
            two.backend.kill()
            await asyncio.to_thread(two.start_backend)
            await disk.write(0, b"again".ljust(512, b"."))

    run(work(), 60)
    assert granted(two, 1) == {"1/51712": [str(other)]}
    two.run("detach", "1", "xvda")
    run(until(lambda: granted(two, 1) is None), 30)
    assert other.read_bytes()[:5] == b"again"


def test_a_disk_that_takes_programs_gets_a_process_that_may_start_them(
    two: Host, requires_tool: Callable[[str], str]
) -> None:
    image = two.qcow2(requires_tool)

    async def work() -> None:
        async with two.disk(1) as disk:
            contents, stop = contents_of(disk, SIZE, 2), asyncio.Event()
            using = asyncio.ensure_future(load(contents, stop))
            before = await two.told(1)
            assert before["confined"]
            await asyncio.to_thread(two.run, "attach", "1", f"vdev=xvdb,target=qcow2:{image}")
            await advances(contents, 20)
            after = await two.told(1)
            assert not after["confined"]
            assert after["pid"] != before["pid"]
            stop.set()
            await using

    run(work(), 60)
    assert "ERROR" not in two.log.read_text()


def test_a_swap_to_such_storage_exchanges_the_process_too(
    two: Host, requires_tool: Callable[[str], str]
) -> None:
    image = two.qcow2(requires_tool)

    async def work() -> None:
        async with two.disk(1) as disk:
            await disk.write(0, b"raw".ljust(512, b"."))
            await asyncio.to_thread(two.run, "swap", "1", "xvda", f"qcow2:{image}")
            assert await disk.read(0, 3) == bytes(3)
            assert not (await two.told(1))["confined"]

    run(work(), 60)


def test_a_swap_to_what_is_no_storage_leaves_the_process(two: Host) -> None:
    async def work() -> None:
        async with two.disk(1):
            before = await two.told(1)
            words = "swap", "1", "xvda", "qcow3:/a.qcow3", "--host", str(two.directory)
            refused = await asyncio.to_thread(run_xvd, *words)
            assert refused.returncode == 1
            assert "unknown storage 'qcow3:/a.qcow3'; there are " in refused.stderr
            assert await two.told(1) == before

    run(work(), 60)


def test_a_disk_is_mirrored_to_an_image_that_is_made_for_it(two: Host) -> None:
    target = two.place / "copy.img"

    async def work() -> None:
        async with two.disk(1) as disk:
            await disk.write(0, b"mirrored".ljust(512, b"."))
            await asyncio.to_thread(two.run, "mirror", "1", "xvda", str(target))
            assert granted(two, 1) is None
            await asyncio.to_thread(two.run, "mirror", "1", "xvda", "--pivot")
            assert granted(two, 1) == {"1/51712": [str(target)]}
            worker = await two.told(1)
            assert worker["confined"]
            os.kill(worker["pid"], signal.SIGKILL)
            await disk.write(0, b"mirrored and moved".ljust(512, b"."))

    run(work(), 60)
    assert target.read_bytes()[:18] == b"mirrored and moved"
