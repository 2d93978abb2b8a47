# SPDX-License-Identifier: Apache-2.0
"""A measured load on a disk: the compiled generator in the place of the queue's own stepping."""

import asyncio
import time
from dataclasses import dataclass

from xvd.blkif.nodes import BackendFeatures
from xvd.dataplane.front import FrontQueue
from xvd.dataplane.load import Load
from xvd.dataplane.thread import Queue
from xvd.errors import XvdError
from xvd.frontend.connection import Connection
from xvd.frontend.device import Device
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
) -> LoadResult:
    """Connect to a disk, run `operations` of `size` bytes, `depth` at a time; close it again.

    Raises as `Disk.open` does.
    """
    loads: list[Load] = []

    def stepper(queue: FrontQueue) -> Queue:
        load = Load(
            queue,
            depth=depth,
            size=size,
            span=span,
            operations=operations,
            write_percent=write_percent,
            seed=seed,
        )
        loads.append(load)
        return load

    user = _User()
    device = Device(machine, store, path, user, stepper=stepper)
    running = asyncio.create_task(device.run())
    try:
        seconds = await user.done
    finally:
        device.close()
        await asyncio.gather(running, return_exceptions=True)
    ended, errors, checksum = loads[0].result
    return LoadResult(ended, errors, seconds, checksum)
