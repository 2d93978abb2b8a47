# SPDX-License-Identifier: Apache-2.0
"""A measured load on a disk: the compiled generator in the place of the queue's own stepping."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from xvd.blkif.nodes import BackendFeatures
from xvd.dataplane.front import FrontQueue
from xvd.dataplane.load import Load
from xvd.errors import XvdError
from xvd.frontend.connection import Connection
from xvd.frontend.device import Device
from xvd.frontend.settings import Settings
from xvd.machine.interface import Machine
from xvd.machine.xs.client import XenstoreClient


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What was measured. checksum: of the data read, which proves that it moved."""

    operations: int
    errors: int
    seconds: float
    checksum: int

    @property
    def iops(self) -> float:
        """Operations per second."""
        return self.operations / self.seconds


class _User:
    """Waits for the load's thread to end; it starts when the disk is connected."""

    def __init__(self) -> None:
        self.done: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._begun = 0.0

    def connected(self, connection: Connection, features: BackendFeatures) -> None:
        self._begun = time.monotonic()

    def resized(self, features: BackendFeatures) -> None:
        """The load keeps to the span it was given."""

    def disconnected(self) -> None:
        if not self.done.done():
            self.done.set_result(time.monotonic() - self._begun)

    def ended(self, error: OSError | XvdError) -> None:
        if not self.done.done():
            self.done.set_exception(error)


async def run_load(
    machine: Machine,
    store: XenstoreClient,
    path: str,
    *,
    depth: int,
    size: int,
    span: int,
    operations: int,
    write_percent: int = 0,
    seed: int = 1,
    settings: Settings | None = None,
) -> LoadResult:
    """Connect to a disk, run `operations` of `size` bytes, `depth` at a time; close it again.

    The same seed is the same load on as many queues.

    Raises as `Disk.open` does.
    """
    loads: list[Load] = []

    def stepper(queues: Sequence[FrontQueue]) -> list[Load]:
        """The load in equal shares; a queue too many for it stands idle."""
        shares = min(len(queues), depth, operations)
        for number, queue in enumerate(queues[:shares]):
            loads.append(
                Load(
                    queue,
                    depth=share(depth, shares, number),
                    size=size,
                    span=span,
                    operations=share(operations, shares, number),
                    write_percent=write_percent,
                    seed=seed + number,
                )
            )
        return loads

    user = _User()
    device = Device(machine, store, path, user, settings=settings, stepper=stepper)
    running = asyncio.create_task(device.run())
    try:
        seconds = await user.done
    finally:
        device.close()
        await asyncio.gather(running, return_exceptions=True)
    ended, errors, checksums = zip(*(load.result for load in loads), strict=True)
    return LoadResult(sum(ended), sum(errors), seconds, sum(checksums) % (1 << 64))


def share(total: int, shares: int, number: int) -> int:
    """One of `shares` parts of `total` that differ by one at most."""
    return total // shares + (number < total % shares)
