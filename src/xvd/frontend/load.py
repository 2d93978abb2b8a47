# SPDX-License-Identifier: Apache-2.0
"""A measured load on a disk: the compiled generator in the place of the queue's own stepping."""

import asyncio
import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from xvd.blkif.features import BackendFeatures
from xvd.dataplane.front.load import Load
from xvd.dataplane.front.queue import FrontQueue
from xvd.errors import ConfigError, XvdError
from xvd.frontend.connection import Connection
from xvd.frontend.device import Device
from xvd.frontend.ending import wait_for_end
from xvd.frontend.settings import Settings
from xvd.machine.interface import Machine
from xvd.machine.xs.client import XenstoreClient
from xvd.types import RING_SECTOR_SIZE


@dataclass(frozen=True, slots=True)
class Job:
    """What a load does; the same job is the same load on as many queues.

    size: bytes of one operation, a multiple of 512. depth: operations under way, over all queues.
    span: bytes of the disk, from its beginning, that it may touch. write_percent: 0 to 100.
    sequential: each queue goes through a part of the span of its own, instead of at random. verify:
    what is written is a function of its place and the seed, and what is read has to be that: the
    span must have been written by such a job before. in_place: the data stays in granted pages and
    is not copied at this end, as in a guest without persistent grants, or whose application has its
    buffers there; not with verify.
    """

    size: int = 4096
    depth: int = 32
    span: int = 256 << 20
    operations: int = 100_000
    write_percent: int = 0
    sequential: bool = False
    verify: bool = False
    seed: int = 1
    in_place: bool = False


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What was measured.

    errors: operations that failed or, with verify, read what was not written. begun_ns, ended_ns:
    the first step of any queue and the last, by the system's monotonic clock. cpu_s: of the queues'
    threads meanwhile. checksum: of the data read, which proves that it moved. counters: the
    queues', added up. span: bytes of the disk that it kept to: the job's, or all that there are.
    """

    operations: int
    errors: int
    begun_ns: int
    ended_ns: int
    cpu_s: float
    checksum: int
    counters: dict[str, int]
    span: int

    @property
    def seconds(self) -> float:
        """How long it took."""
        return (self.ended_ns - self.begun_ns) / 1e9

    @property
    def iops(self) -> float:
        """Operations per second."""
        return self.operations / self.seconds


CLOSE_S, CANCELLED_S = 10.0, 2.0
"""For the backend to close a disk whose load has ended, or was broken off."""


class _User:
    """Waits for the load's threads to end; they start when the disk is connected."""

    def __init__(self) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.counters: dict[str, int] = {}
        self._connection: Connection | None = None

    def connected(self, connection: Connection, _features: BackendFeatures) -> None:
        self._connection = connection

    def resized(self, features: BackendFeatures) -> None:
        """The load keeps to the span it was given."""

    def disconnected(self) -> None:
        assert self._connection is not None
        self.counters = self._connection.statistics().total().numbers()
        if not self.done.done():
            self.done.set_result(None)

    def ended(self, error: OSError | XvdError) -> None:
        if not self.done.done():
            self.done.set_exception(error)


async def run_load(
    machine: Machine,
    store: XenstoreClient,
    path: str,
    job: Job,
    *,
    settings: Settings | None = None,
    on_start: Callable[[], None] | None = None,
    on_end: Callable[[], None] | None = None,
) -> LoadResult:
    """Connect to a disk, do the job, close the disk again.

    on_start, on_end: called when the disk is connected, before the first operation, and when the
    last has ended, before the disk is closed.

    Raises as `Disk.open` does, `LocalProtocolError` for a job that is none, and OSError (ENODEV)
    for a backend that leaves before the end.
    """
    loads: list[Load] = []

    span = 0

    def stepper(queues: Sequence[FrontQueue]) -> list[Load]:
        nonlocal span
        shares = min(len(queues), job.depth, job.operations)
        fitted = _fitted(job, device)
        span = fitted.span
        loads.extend(_share(queue, fitted, shares, i) for i, queue in enumerate(queues[:shares]))
        if on_start is not None:
            on_start()
        return loads

    user = _User()
    device = Device(machine, store, path, user, settings=settings, stepper=stepper)
    running = asyncio.create_task(device.run())
    patience_s = CLOSE_S
    try:
        await user.done
        if on_end is not None:
            on_end()
    except asyncio.CancelledError:
        patience_s = CANCELLED_S
        raise
    finally:
        device.close()
        await wait_for_end(running, device.abandon, patience_s)
    ended, errors, checksums = zip(*(load.result for load in loads), strict=True)
    if sum(ended) < job.operations:
        raise OSError(errno.ENODEV, f"the backend left after {sum(ended)} operations")
    begun_ns, ended_ns, cpu_ns = zip(*(load.times for load in loads), strict=True)
    return LoadResult(
        operations=sum(ended),
        errors=sum(errors),
        begun_ns=min(begun_ns),
        ended_ns=max(ended_ns),
        cpu_s=sum(cpu_ns) / 1e9,
        checksum=sum(checksums) % (1 << 64),
        counters=user.counters,
        span=span,
    )


def _fitted(job: Job, device: Device) -> Job:
    """The job on the disk that there is; `ConfigError` if not one operation fits."""
    assert device.features is not None
    size = device.features.sectors * RING_SECTOR_SIZE
    if size < job.size:
        raise ConfigError(f"{device.name} has {size} bytes: too few for one of {job.size}")
    return replace(job, span=min(job.span, size))


def _share(queue: FrontQueue, job: Job, shares: int, number: int) -> Load:
    """Return one queue's part of a job; a queue too many for it stands idle."""
    places = job.span // job.size
    return Load(
        queue,
        depth=share(job.depth, shares, number),
        size=job.size,
        span=job.span,
        operations=share(job.operations, shares, number),
        write_percent=job.write_percent,
        seed=job.seed + number,
        sequential=job.sequential,
        first=places * number // shares * job.size,
        verify=job.seed if job.verify else 0,
        in_place=job.in_place,
    )


def share(total: int, shares: int, number: int) -> int:
    """Return one of `shares` parts of `total` that differ by one at most."""
    return total // shares + (number < total % shares)
