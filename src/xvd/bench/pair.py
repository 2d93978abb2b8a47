# SPDX-License-Identifier: Apache-2.0
"""Both ends of a ring without threads: whoever made them steps one, then the other."""

from xvd.blkif.abi import Abi, Op
from xvd.dataplane.back.options import BackOptions
from xvd.dataplane.front.load import Load
from xvd.dataplane.front.options import FrontOptions
from xvd.engines.uri import open_engine
from xvd.frontend.load import Job
from xvd.machine.emulated.host import Host
from xvd.machine.emulated.machine import EmulatedMachine
from xvd.machine.xs.client import XenstoreClient
from xvd.types import RING_SECTOR_SIZE, Domid
from xvd.xenbus.links import BackLink, FrontLink


async def _no_store() -> XenstoreClient:
    raise AssertionError("a queue needs no xenstore")


class Pair:
    """A disk of one queue, and a job on it; `step` the `load`, then the `back`.

    The job's operations are of 4 KiB at most, and 32 at most are under way.
    """

    def __init__(
        self, engine: str, job: Job, *, persistent: bool = True, ring_pages: int = 1
    ) -> None:
        self.depth = job.depth
        host = Host()
        ends = []
        for domid in (Domid(0), Domid(1)):
            host.create_domain(domid)
            ends.append(EmulatedMachine(host.open(domid), _no_store))
        back, front = ends
        link = FrontLink(front, Domid(0), ring_pages, Abi.X86_64)
        options = FrontOptions(segments_max=1, persistent=persistent)
        self.load = Load(
            link.prepare(front.grants.share(Domid(0), link.entries), options),
            depth=job.depth, size=job.size, span=job.span, operations=job.operations,
            write_percent=job.write_percent, seed=job.seed, in_place=job.in_place,
        )  # fmt: skip
        storage = open_engine(engine)
        self.back = BackLink(back, Domid(1), link.nodes, Abi.X86_64).prepare(
            storage.open_channel(),
            BackOptions(
                capacity=storage.info.size // RING_SECTOR_SIZE,
                offered=1 << Op.READ | 1 << Op.WRITE,
                persistent=persistent,
            ),
        )
