# SPDX-License-Identifier: Apache-2.0
"""Operations that persist over connections.

An operation is submitted to a queue of the connection that is up, or waits for one; what a backend
took and never answered goes to the next one, in the order of submission, and is cut anew by its
limits. What the next one does not offer any more ends as if it had said so itself (EOPNOTSUPP):
whoever asked falls back as in any other case.
"""

import asyncio
import contextlib
import errno
import os
from dataclasses import dataclass, field

from xvd.blkif.abi import DiscardFlag, Op
from xvd.blkif.features import BackendFeatures, offered_operations
from xvd.blkif.operations import OFFER_SECURE, ROW_OF, Data
from xvd.dataplane.front.queue import FrontQueue
from xvd.frontend.connection import Connection
from xvd.types import RING_SECTOR_SIZE

Buffer = bytes | bytearray | memoryview


class BlocksChanged(Exception):
    """The next backend's blocks are larger: the operation is no whole number of them."""


@dataclass(slots=True)
class Operation:
    """One operation; `done` gets 0 or an errno."""

    operation: Op
    sector_number: int
    nr_sectors: int
    buffer: Buffer | None = field(repr=False)
    flag: int
    done: asyncio.Future[int]

    def writes_to(self, first: int, end: int) -> bool:
        """Whether this is a write that touches the sectors from `first` to before `end`."""
        touches = self.sector_number < end and first < self.sector_number + self.nr_sectors
        return touches and ROW_OF[self.operation].data is Data.TO_DISK

    def fits_blocks(self, features: BackendFeatures) -> bool:
        """Whether it is whole blocks of such a backend; a discard is a hint, and always is."""
        block = features.sector_size // RING_SECTOR_SIZE
        moves_data = ROW_OF[self.operation].data is not Data.NONE
        return not moves_data or (self.sector_number % block == 0 == self.nr_sectors % block)

    def is_offered(self, offered: int) -> bool:
        """Whether a backend takes it that offers these bits of `offered_operations`."""
        secure = self.flag & DiscardFlag.SECURE
        return bool(offered & (OFFER_SECURE if secure else 1 << self.operation))

    def is_longer_than(self, sectors: int) -> bool:
        """Whether it has more data than goes into one request, and cannot be cut."""
        row = ROW_OF[self.operation]
        return row.data is not Data.NONE and not row.divisible and self.nr_sectors > sectors


class Pending:
    """The operations of one disk that are not over. Everything in the event loop's thread."""

    def __init__(self) -> None:
        self._connection: Connection | None = None
        self._features: BackendFeatures | None = None
        self._offered = 0
        self._ends: list[int] = []
        self._turn = 0
        self._to_wake: set[int] = set()
        self._operations: dict[int, Operation] = {}
        self._next_token = 0
        self._ended: OSError | None = None

    # ---- Connections ----

    def connected(self, connection: Connection, features: BackendFeatures) -> None:
        """A connection is up: everything outstanding goes on it."""
        self._connection, self._features = connection, features
        self._offered = offered_operations(features)
        self._ends = [-1] * len(connection.queues)
        for queue in connection.queues:
            asyncio.get_running_loop().add_reader(queue.done_fd, self._reap, queue)
        for token in list(self._operations):
            self._put(token)

    def disconnected(self) -> None:
        """Note that the queues have ended; answers that came are taken, the rest waits."""
        assert self._connection is not None
        for queue in self._connection.queues:
            self._reap(queue)
            asyncio.get_running_loop().remove_reader(queue.done_fd)
        self._connection = None
        self._to_wake.clear()

    def ended(self, error: OSError) -> None:
        """Fail whatever waits, and what comes: there will be no connection again."""
        self._ended = error
        for one in self._operations.values():
            if not one.done.done():
                one.done.set_exception(error)
        self._operations.clear()

    def _reap(self, queue: FrontQueue) -> None:
        with contextlib.suppress(BlockingIOError):  # `disconnected` polls without being rung for
            os.eventfd_read(queue.done_fd)
        for token, error in queue.reap():
            self._over(token, error)

    def _over(self, token: int, outcome: int | Exception) -> None:
        done = self._operations.pop(token).done
        if done.done():
            return
        if isinstance(outcome, int):
            done.set_result(outcome)
        else:
            done.set_exception(outcome)

    # ---- Operations ----

    def _put(self, token: int) -> None:
        """Submit an operation to the connection that is up, if it takes such a one."""
        assert self._connection is not None
        assert self._features is not None
        one = self._operations[token]
        if not one.fits_blocks(self._features):
            self._over(token, BlocksChanged())
            return
        too_long = one.is_longer_than(self._connection.barrier_sectors_max)
        if too_long or not one.is_offered(self._offered):
            self._over(token, errno.EOPNOTSUPP)
            return
        number = self._choose(one.sector_number)
        self._ends[number] = one.sector_number + one.nr_sectors
        if self._connection.queues[number].submit(
            one.operation, one.sector_number, one.nr_sectors, one.buffer, token, flag=one.flag
        ):
            if not self._to_wake:
                asyncio.get_running_loop().call_soon(self._wake)
            self._to_wake.add(number)

    def _choose(self, sector_number: int) -> int:
        """Which queue an operation goes to: what goes on where a queue's last one ended goes to
        that queue, which can join the two; anything else goes to the next queue in turn."""
        if len(self._ends) == 1:
            return 0
        if sector_number in self._ends:
            return self._ends.index(sector_number)
        self._turn = (self._turn + 1) % len(self._ends)
        return self._turn

    def _wake(self) -> None:
        """Let the queues take all of one round of the event loop at once: neighbours are joined."""
        for number in self._to_wake:
            assert self._connection is not None
            if (runner := self._connection.links[number].runner) is not None:
                runner.wake()
        self._to_wake.clear()

    async def run(
        self,
        operation: Op,
        first: int = 0,
        sectors: int = 0,
        buffer: Buffer | None = None,
        *,
        flag: int = 0,
    ) -> None:
        """Submit whole blocks and wait.

        OSError for what the backend refused, ENODEV if there is none any more. `BlocksChanged` if
        one with larger blocks came meanwhile.
        """
        if self._ended is not None:
            raise self._ended
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        token, self._next_token = self._next_token, self._next_token + 1
        self._operations[token] = Operation(operation, first, sectors, buffer, flag, done)
        if self._connection is not None:
            self._put(token)
        error = await done
        if error:
            where = f"{operation.name} of {sectors} sectors at {first}"
            raise OSError(error, f"{where}: {os.strerror(error)}")

    def writes_on(self, first: int, end: int) -> list[asyncio.Future[int]]:
        """The ends of all writes under way that touch these sectors."""
        return [one.done for one in self._operations.values() if one.writes_to(first, end)]
