# SPDX-License-Identifier: Apache-2.0
"""What a disk's ``params`` node says of its format: what the user has said, and nothing else."""

import pytest
from rig_disk import disk_world, run

from xvd.toolstack.vbd import add
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
