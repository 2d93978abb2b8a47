# SPDX-License-Identifier: Apache-2.0
"""A CD-ROM is read-only on every way in, whatever else is said."""

from pathlib import Path

import pytest
from rig_disk import disk_world, run
from rig_guest import RawFrontend, backend_reaches
from rig_queue import rq

from xvd.blkif.abi import InfoFlag, Op, Status
from xvd.blkif.assignment import parse_backend_assignment
from xvd.blkif.messages import Segment
from xvd.toolstack.vbd import attach
from xvd.toolstack.xldisk import parse_xl_disk
from xvd.types import Domid

TOOLSTACK = {
    "frontend": "/local/domain/1/device/vbd/51728", "frontend-id": "1", "params": "/x.iso",
}  # fmt: skip


@pytest.fixture
def iso(tmp_path: Path) -> Path:
    path = tmp_path / "x.iso"
    path.write_bytes(b"c" * (1 << 20))
    return path


@pytest.mark.parametrize(
    "words", ["devtype=cdrom", "cdrom", "access=rw,devtype=cdrom", "cdrom,access=w"]
)
def test_a_description_of_one_is_read_only(words: str) -> None:
    assert not parse_xl_disk(f"vdev=xvdb,{words},target=/x.iso").writable


@pytest.mark.parametrize("mode", ["w", "rw", "w!", "r", ""])
def test_the_nodes_of_one_are_read_only(mode: str) -> None:
    nodes = TOOLSTACK | {"mode": mode, "device-type": "cdrom"}
    assert not parse_backend_assignment(nodes).writable


@pytest.mark.parametrize("mode", ["r", "w"])
def test_its_guest_is_told_and_what_it_writes_is_refused(iso: Path, mode: str) -> None:
    """mode: also from a toolstack that says that it may be written to."""

    async def work() -> None:
        async with disk_world() as world:
            machine, store = await world.guest()
            disk = parse_xl_disk(f"vdev=xvdb,devtype=cdrom,target={iso}")
            disk.writable = mode == "w"
            vbd = await attach(world.store, Domid(1), disk)
            frontend = RawFrontend(machine, store, vbd)
            await frontend.publish()
            await backend_reaches(world, vbd, 4)
            flags = InfoFlag(int(await world.store.read(f"{vbd.backend}/info")))
            assert flags == InfoFlag.CDROM | InfoFlag.REMOVABLE | InfoFlag.READONLY
            assert await world.store.read(f"{vbd.backend}/mode") == mode
            answer = await frontend.ask(rq(Op.WRITE, 0, Segment(frontend.pages.grefs[0])))
            assert answer.status == Status.ERROR
            frontend.close()

    run(work())
    assert iso.read_bytes() == b"c" * (1 << 20)
