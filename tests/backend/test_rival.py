# SPDX-License-Identifier: Apache-2.0
"""Another backend on the same host, there from the beginning or loaded later."""

from collections.abc import Callable
from pathlib import Path

import pytest
from rig_disk import disk_world, opener, run
from rig_guest import RawFrontend, backend_error, backend_reaches

from xvd.backend.rival import rival
from xvd.backend.server import Server
from xvd.errors import PeerClosed


def test_linuxs_backend_is_known_by_its_driver(tmp_path: Path) -> None:
    assert rival("vbd", sys_dir=tmp_path) == ""
    (tmp_path / "bus/xen-backend/drivers/vbd").mkdir(parents=True)

    assert "modprobe -r xen-blkback" in rival("vbd", sys_dir=tmp_path)
    assert rival("vbd3", proc=tmp_path, sys_dir=tmp_path) == ""


def test_blktaps_backend_is_known_by_its_process(tmp_path: Path) -> None:
    (tmp_path / "77").mkdir()
    (tmp_path / "77" / "comm").write_text("tapback\n")

    assert rival("vbd3", proc=tmp_path) == "blktap's tapback; stop it"


class Other:
    """A backend that may be loaded."""

    loaded = ""

    def __call__(self, kind: str) -> str:
        return self.loaded


def test_a_disk_is_left_to_a_backend_that_was_loaded_meanwhile(
    expect_log: Callable[[str], None],
) -> None:
    expect_log(r"backend/vbd/1/51728: left to xen-blkback; unload it; then attach the disk again")
    other = Other()

    async def work() -> None:
        async with disk_world(serve=False) as world:
            world.server = Server(world.dom0, world.store, opener(), rival=other)
            await world.server.start()
            first = await world.attach()
            other.loaded = "xen-blkback; unload it"
            with pytest.raises(PeerClosed, match="no backend has taken"):
                await world.attach("memory:1M", vdev="xvdb", timeout_s=0.5)
            assert list(world.server.devices) == ["backend/vbd/1/51712"]
            await backend_reaches(world, first, 2)
            other.loaded = ""
            await world.attach("memory:1M", vdev="xvdb")

    run(work())


def test_a_port_that_another_backend_has_is_said_to_be(expect_log: Callable[[str], None]) -> None:
    expect_log("the disk is served by xen-blkback; unload it")
    other = Other()

    async def work() -> None:
        async with disk_world(serve=False) as world:
            world.server = Server(world.dom0, world.store, opener(), rival=other)
            await world.server.start()
            vbd = await world.attach()
            machine, store = await world.guest()
            frontend = RawFrontend(machine, store, vbd)
            other.loaded = "xen-blkback; unload it"
            taken = world.dom0.event_channels.bind_interdomain(vbd.domid, frontend.port.port)
            await frontend.publish()
            await backend_reaches(world, vbd, 5, 6)
            assert "served by xen-blkback" in await backend_error(world, vbd)
            taken.close()
            frontend.close()

    run(work())
