# SPDX-License-Identifier: Apache-2.0
"""Domains whose kernels have larger pages than Xen: each page that is granted takes one of those.

Both ends are xvd's. What lies behind the first 4096 bytes of such a page cannot be touched where it
is mapped, so one wrong address ends the process.
"""

import asyncio
import itertools
import random

import pytest
from rig_disk import disk_world, run

from xvd.backend.settings import Settings
from xvd.frontend.settings import Settings as FrontSettings
from xvd.machine.emulated.limits import Limits

KIB = 1024
LARGE = Limits(pages=131072, grefs=65536, tracks=16384, ports=64)
KERNELS = [(16 * KIB, 4 * KIB), (64 * KIB, 4 * KIB), (4 * KIB, 16 * KIB), (64 * KIB, 64 * KIB)]
"""The page sizes of the two domains, the backend's first."""

TRANSFERS = {
    "persistent": Settings(max_ring_page_order=2),
    "mapped": Settings(max_ring_page_order=2, feature_persistent=False),
    "copied": Settings(max_ring_page_order=2, copying=True),
    "no indirect requests": Settings(max_ring_page_order=2, max_indirect_segments=0),
}


@pytest.mark.parametrize("transfer", TRANSFERS)
@pytest.mark.parametrize(("dom0_page", "guest_page"), KERNELS)
def test_a_disk_is_the_same_whatever_the_pages_of_the_kernels(
    dom0_page: int, guest_page: int, transfer: str
) -> None:
    async def work() -> None:
        front = FrontSettings(
            max_ring_page_order=2, pool_pages=512, page_size=guest_page, max_indirect_segments=64
        )
        async with (
            disk_world(
                settings=TRANSFERS[transfer], limits=LARGE, dom0_page=dom0_page,
                guest_page=guest_page,
            ) as world,
            await world.disk(front=front) as disk,
        ):  # fmt: skip
            data = random.Random(guest_page).randbytes(3 << 20)
            cuts = [0, 512, 5120, 70_144, 1 << 20, (2 << 20) + 512, len(data)]
            pieces = itertools.pairwise(cuts)
            await asyncio.gather(*(disk.write(at, data[at:end]) for at, end in pieces))
            # More requests than a ring of several pages has entries: its end is gone over.
            singles = range(0, len(data), 4096)
            found = await asyncio.gather(*(disk.read(at, 4096) for at in singles))
            assert b"".join(found) == data
            assert await disk.read(0, len(data)) == data

    run(work())
