# SPDX-License-Identifier: Apache-2.0
"""What the frontend's user does: random operations, each checked by a model."""

from dataclasses import dataclass

from xvd.sim.checkers import SECTOR, CheckFailed, ModelDisk, pattern
from xvd.sim.ends import SimFrontend
from xvd.sim.prng import Prng

READ, WRITE, BARRIER, FLUSH, DISCARD = 0, 1, 2, 3, 5
_CHANGES = (WRITE, BARRIER, DISCARD)


@dataclass(slots=True)
class _Operation:
    """flushing: of a barrier that is done as a write and then a flush, whether it is at the flush;
    None if it is done in one."""

    kind: int
    first: int
    count: int
    buffer: bytearray | None
    tag: int = 0
    flushing: bool | None = None


class Workload:
    """Keeps up to `depth` operations outstanding on the queues of whichever frontend there is.

    What a frontend does not have done is done in the next best way, as frontend/disk.py does.
    sectors: the size that the user has been told of.
    """

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
        self.sectors = model.sectors
        self.finished = 0
        self.failed = 0
        self.unsupported = 0

    @property
    def outstanding(self) -> int:
        """Operations submitted and not over."""
        return len(self._outstanding)

    # ---- Beginning ----

    def submit(self, front: SimFrontend) -> bool:
        """Begin one more, if there is room for it."""
        if len(self._outstanding) >= self._depth:
            return False
        kind = self._prng.weighted(self._mix)
        longest = min(self._sectors_max, self.sectors)
        if kind == BARRIER:
            longest = min(longest, front.links[0].queue.barrier_sectors_max)
        count = self._prng.between(1, longest)
        first = self._choose(count)
        if kind in _CHANGES and self._overlaps_change(first, count):
            return False
        if kind == DISCARD and not front.shape.discard:
            return False
        self._tokens += 1
        self._outstanding[self._tokens] = self._prepare(kind, first, count)
        self._put(self._tokens, front)
        return True

    def _choose(self, count: int) -> int:
        """Anywhere, and often where the last one ended: such are joined."""
        goes_on = self._prng.chance(2) and self._end + count <= self.sectors
        first = self._end if goes_on else self._prng.below(self.sectors - count + 1)
        self._end = first + count
        return first

    def _prepare(self, kind: int, first: int, count: int) -> _Operation:
        if kind == FLUSH:
            self._model.begin_flush(self._tokens)
            return _Operation(kind, 0, 0, None)
        if kind == READ:
            self._model.begin_read(self._tokens, first, count)
            return _Operation(kind, first, count, bytearray(count * SECTOR))
        if kind == DISCARD:
            self._model.begin_write(0, first, count)
            return _Operation(kind, first, count, None)
        tag = self._model.new_tag()
        self._model.begin_write(tag, first, count)
        if kind == BARRIER:
            self._model.begin_flush(self._tokens)
        data = b"".join(pattern(tag, s) for s in range(first, first + count))
        return _Operation(kind, first, count, bytearray(data), tag)

    def _overlaps_change(self, first: int, count: int) -> bool:
        return any(
            other.kind in _CHANGES
            and first < other.first + other.count
            and other.first < first + count
            for other in self._outstanding.values()
        )

    def _put(self, token: int, front: SimFrontend) -> None:
        """Let one of the queues do it, or its next part."""
        one, shape = self._outstanding[token], front.shape
        link = front.links[self._prng.below(len(front.links))]
        kind = one.kind
        if kind == BARRIER and one.flushing is None:
            whole = shape.barrier and one.count <= link.queue.barrier_sectors_max
            one.flushing = None if whole else False
        if kind == FLUSH or one.flushing:
            link.queue.submit(FLUSH if shape.flush else BARRIER, 0, 0, None, token)
        else:
            kind = WRITE if one.flushing is False else kind
            link.queue.submit(kind, one.first, one.count, one.buffer, token)
        link.wake()

    def go_on(self, front: SimFrontend) -> None:
        """Do everything outstanding again, on a frontend that has taken the place of another."""
        for token, one in list(self._outstanding.items()):
            if one.kind == DISCARD and not front.shape.discard:
                del self._outstanding[token]
                self.unsupported += 1
                continue
            one.flushing = None
            self._put(token, front)

    # ---- Ending ----

    def reap(self, front: SimFrontend) -> int:
        """Check everything that has ended. How many."""
        over = [each for link in front.links for each in link.queue.reap()]
        for token, error in over:
            one = self._outstanding.get(token)
            if one is None:
                raise CheckFailed(f"operation {token} has ended a second time")
            if one.flushing is False and error == 0:
                one.flushing = True
                self._put(token, front)
                continue
            del self._outstanding[token]
            self._check(token, one, error)
        return len(over)

    def _check(self, token: int, one: _Operation, error: int) -> None:
        done = error == 0
        self.finished += 1
        self.failed += not done
        if one.kind == READ:
            self._model.end_read(token, bytes(one.buffer or b"") if done else None)
        if one.kind in (WRITE, BARRIER):
            self._model.end_write(one.tag, one.first, one.count, acknowledged=done)
        if one.kind in (FLUSH, BARRIER):
            self._model.end_flush(token, acknowledged=done)
        if one.kind == BARRIER and done:
            self._model.settle(one.first, one.count)

    def frontend_died(self) -> None:
        """Let the model know that what was outstanding may or may not have happened."""
        self._outstanding.clear()
        self._model.forget_users()
