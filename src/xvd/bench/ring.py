# SPDX-License-Identifier: Apache-2.0
"""The data path on an emulated host in this process: one native thread per queue and end."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass, field, replace

from xvd.backend.server import Server
from xvd.backend.settings import Settings as BackendSettings
from xvd.bench.sample import Case, Sample
from xvd.blkif.assignment import BackendAssignment
from xvd.engines.interface import Engine
from xvd.engines.uri import open_engine, storage_uri
from xvd.frontend.load import Job, LoadResult, run_load
from xvd.frontend.settings import Settings as FrontendSettings
from xvd.machine.emulated.service import EmulatedHost
from xvd.machine.interface import Machine
from xvd.machine.xs.client import XenstoreClient
from xvd.toolstack.vbd import attach, create_guest, detach
from xvd.toolstack.xldisk import XlDisk
from xvd.types import Domid

GUEST = Domid(1)
NULL = "null:256M,read-zeroes=off"
"""Storage that costs nothing: neither end moves data for it that a guest has not."""
ONE_QUEUE = FrontendSettings(max_queues=1)
MAPPING = BackendSettings(feature_persistent=False)
COPYING = BackendSettings(copying=True)
PERSISTENT = BackendSettings()


@dataclass(frozen=True, slots=True)
class Setup:
    """A disk, what both ends of it would like, and what is done to it.

    filled: the span is written first, sequentially, so that there is something to read.
    """

    engine: str = NULL
    layers: tuple[str, ...] = ()
    back: BackendSettings = PERSISTENT
    front: FrontendSettings = ONE_QUEUE
    job: Job = field(default_factory=Job)
    filled: bool = False


@dataclass(frozen=True, slots=True)
class Guest:
    """An emulated guest with one disk."""

    server: Server
    machine: Machine
    store: XenstoreClient
    path: str


@contextlib.asynccontextmanager
async def guest(setup: Setup) -> AsyncIterator[Guest]:
    """A host of its own, with the disk attached."""
    first = [open_engine(setup.engine, layers=setup.layers)]

    async def opener(assignment: BackendAssignment) -> Engine:
        """The disk's own, and after that what it is to be copied to."""
        return first.pop() if first else open_engine(storage_uri(assignment))

    async with EmulatedHost() as host:
        back = host.machine(Domid(0))
        store = await back.xenstore()
        host.create_domain(GUEST)
        await create_guest(store, GUEST, "guest")
        server = Server(back, store, opener, settings=setup.back)
        await server.start()
        vbd = await attach(store, GUEST, XlDisk(target=setup.engine, vdev="xvda"))
        front = host.machine(GUEST)
        guest_store = await front.xenstore()
        try:
            yield Guest(server, front, guest_store, f"device/vbd/{vbd.vdev}")
            await detach(store, vbd)
        finally:
            await server.close()
            await guest_store.close()
            await store.close()


def backend_cpu(others: Collection[threading.Thread]) -> float:
    """CPU seconds of the backends' threads: of all but `others`, when no frontend's runs."""
    total = 0.0
    for thread in threading.enumerate():
        if thread not in others and thread.ident is not None:
            total += time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
    return total


def filling(job: Job) -> Job:
    """The job that writes everything that `job` may read."""
    size = min(256 << 10, job.span)
    return replace(
        job, size=size, depth=4, operations=job.span // size, write_percent=100, sequential=True
    )


def _nothing(guest: Guest) -> None:
    pass


async def measure(
    setup: Setup,
    *,
    at_begin: Callable[[Guest], None] = _nothing,
    at_end: Callable[[Guest], None] = _nothing,
) -> Sample:
    """Run the setup's job once; the two calls come before it, and after its last operation."""
    cpu = 0.0
    others = threading.enumerate()
    async with guest(setup) as disk:

        def ended() -> None:
            nonlocal cpu
            # The filling's connection was another, with a thread that is gone.
            cpu = backend_cpu(others)
            at_end(disk)
            counts.update(backend_counters(disk.server))

        counts: dict[str, float] = {}
        if setup.filled:
            fill = filling(setup.job)
            await run_load(disk.machine, disk.store, disk.path, fill, settings=ONE_QUEUE)
        at_begin(disk)
        result = await run_load(
            disk.machine, disk.store, disk.path, setup.job, settings=setup.front, on_end=ended
        )
    return sample_of(setup.job, result, cpu, counts)


def backend_counters(server: Server) -> dict[str, float]:
    """The counters of every connected disk, added up, each as ``back_NAME``."""
    total: dict[str, float] = {}
    for device in server.devices.values():
        if device.disk.connection is None:
            continue
        connection = device.disk.connection
        for counters in (connection.counters(), connection.loop_counters()):
            for name, value in counters.numbers().items():
                total[f"back_{name}"] = total.get(f"back_{name}", 0) + value
    return total


def sample_of(job: Job, result: LoadResult, back_s: float, counts: dict[str, float]) -> Sample:
    """A load's result as a sample."""
    fronts = {f"front_{name}": float(value) for name, value in result.counters.items()}
    return Sample(
        operations=result.operations,
        seconds=result.seconds,
        bytes=result.operations * job.size,
        errors=result.errors,
        front_ns=result.cpu_s / result.operations * 1e9,
        back_ns=back_s / result.operations * 1e9,
        checksum="" if job.write_percent else f"{result.checksum:016x}",
        counts=counts | fronts | {"span": float(result.span)},
    )


def case(name: str, setup: Setup) -> Case:
    """The setup as a case."""
    return Case(name, lambda: asyncio.run(measure(setup)))
