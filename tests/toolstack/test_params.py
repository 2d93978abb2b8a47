# SPDX-License-Identifier: Apache-2.0
"""What a disk's ``params`` node says of its format: what the user has said, and nothing else."""

from collections.abc import Callable
from pathlib import Path

import pytest
from rig_disk import disk_world, opener, run

from xvd.errors import PeerClosed
from xvd.toolstack.vbd import add, attach, detach
from xvd.toolstack.xldisk import parse_xl_disk
from xvd.types import DOM0, Domid


@pytest.mark.parametrize(
    ("words", "params"),
    [
        ("vdev=xvda,target=/a.img", "/a.img"),
        ("vdev=xvda,format=raw,target=/a.img", "raw:/a.img"),
        ("vdev=xvda,format=raw,target=file:/a.img", "raw:/a.img"),
        ("vdev=xvda,format=raw,target=memory:1M", "memory:1M"),
        ("vdev=xvda,format=raw,target=raw:/a.img", "raw:/a.img"),
        ("vdev=xvda,format=qcow2,target=/a.img", "qcow2:/a.img"),
        ("vdev=xvda,format=vhd,target=/a.img", "vhd:/a.img"),
        ("vdev=xvda,format=qcow2,target=file:/a.img", "qcow2:/a.img"),
        ("/a.img,qed,xvda", "qed:/a.img"),
        ("/a.img,raw,xvda", "raw:/a.img"),
    ],
)
def test_the_format_that_the_user_says_is_in_the_nodes(words: str, params: str) -> None:
    async def work() -> None:
        async with disk_world(serve=False) as world:
            await world.guest()
            vbd = await add(world.store, Domid(1), parse_xl_disk(words), DOM0)
            assert await world.store.read(f"{vbd.backend}/params") == params

    run(work())


def test_what_a_guest_writes_does_not_take_its_disk_from_it(
    tmp_path: Path, expect_log: Callable[[str], None]
) -> None:
    """A guest that puts LUKS on its whole disk: the next backend goes on, a new attach asks."""
    expect_log("it begins or ends as a luks image does")
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))

    async def work() -> None:
        async with disk_world() as world:
            vbd = await world.attach(str(path))
            async with await world.open(vbd) as disk:
                await disk.write(0, b"LUKS\xba\xbe\0\2")
                assert world.server is not None
                await world.server.close()
                await world.serve(opener())
                assert await disk.read(0, 4) == b"LUKS"
                assert disk.connections == 1
            await detach(world.store, vbd)
            with pytest.raises(PeerClosed, match="if it is raw all the same, say so: format=raw"):
                await world.attach(str(path))
            said = parse_xl_disk(f"format=raw,vdev=xvda,target={path}")
            await attach(world.store, Domid(1), said)

    run(work())
