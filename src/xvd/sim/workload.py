# SPDX-License-Identifier: Apache-2.0
"""What the frontend's user does: random operations, each checked by a model."""

from dataclasses import dataclass

from xvd.dataplane.front import FrontQueue
from xvd.sim.checkers import SECTOR, CheckFailed, ModelDisk, pattern
from xvd.sim.prng import Prng

READ, WRITE, BARRIER, FLUSH, DISCARD = 0, 1, 2, 3, 5
_CHANGES = (WRITE, BARRIER, DISCARD)


@dataclass(slots=True)
class _Operation:
    kind: int
    first: int
    count: int
    buffer: bytearray | None
    tag: int = 0


class Workload:
    """Keeps up to `depth` operations outstanding on whichever queue is the current one."""

    def __init__(self, prng: Prng, model: ModelDisk, *, depth: int, sectors_max: int) -> None:
        self._prng = prng
        self._model = model
        self._depth = depth
        self._sectors_max = sectors_max
        self._outstanding: dict[int, _Operation] = {}
        self._tokens = 0
        self._end = 0
        self._mix = {READ: prng.between(1, 5), WRITE: prng.between(1, 5), FLUSH: 1, DISCARD: 1}
        self._mix[BARRIER] = prng.below(2)
        self.finished = 0
        self.failed = 0

    @property
    def outstanding(self) -> int:
        """Operations submitted and not over."""
        return len(self._outstanding)

    def submit(self, queue: FrontQueue) -> bool:
        """Begin one more, if there is room for it."""
        if len(self._outstanding) >= self._depth:
            return False
        kind = self._prng.weighted(self._mix)
        longest = min(self._sectors_max, self._model.sectors)
        if kind == BARRIER:
            longest = min(longest, queue.barrier_sectors_max)
        count = self._prng.between(1, longest)
        first = self._choose(count)
        if kind in _CHANGES and self._overlaps_change(first, count):
            return False
        self._tokens += 1
        operation = self._prepare(kind, first, count)
        self._outstanding[self._tokens] = operation
        if kind == FLUSH:
            queue.submit(FLUSH, 0, 0, None, self._tokens)
        else:
            queue.submit(kind, first, count, operation.buffer, self._tokens)
        return True

    def _choose(self, count: int) -> int:
        """Anywhere, and often where the last one ended: such are joined."""
        goes_on = self._prng.chance(2) and self._end + count <= self._model.sectors
        first = self._end if goes_on else self._prng.below(self._model.sectors - count + 1)
        self._end = first + count
        return first

    def _prepare(self, kind: int, first: int, count: int) -> _Operation:
        if kind == READ:
            self._model.begin_read(self._tokens, first, count)
            return _Operation(kind, first, count, bytearray(count * SECTOR))
        if kind in (WRITE, BARRIER):
            tag = self._model.new_tag()
            self._model.begin_write(tag, first, count)
            data = b"".join(pattern(tag, s) for s in range(first, first + count))
            return _Operation(kind, first, count, bytearray(data), tag)
        if kind == DISCARD:
            self._model.begin_write(0, first, count)
        return _Operation(kind, first, count, None)

    def _overlaps_change(self, first: int, count: int) -> bool:
        return any(
            other.kind in _CHANGES
            and first < other.first + other.count
            and other.first < first + count
            for other in self._outstanding.values()
        )

    def reap(self, queue: FrontQueue) -> int:
        """Check everything that is over. How many."""
        over = queue.reap()
        for token, error in over:
            operation = self._outstanding.pop(token, None)
            if operation is None:
                raise CheckFailed(f"operation {token} is over a second time")
            self._check(token, operation, error)
        return len(over)

    def _check(self, token: int, operation: _Operation, error: int) -> None:
        self.finished += 1
        self.failed += error != 0
        if operation.kind == READ:
            data = bytes(operation.buffer or b"") if error == 0 else None
            self._model.end_read(token, data)
        elif operation.kind in (WRITE, BARRIER):
            where = operation.tag, operation.first, operation.count
            self._model.end_write(*where, acknowledged=error == 0)

    def frontend_died(self) -> None:
        """What was outstanding may or may not have happened."""
        self._outstanding.clear()
        self._model.forget_reads()
