# SPDX-License-Identifier: Apache-2.0
"""Storage under the scheduler's hand: what is submitted waits until its outcome is drawn."""

import errno

from xvd.engines.bridge import BridgeChannel, Operation
from xvd.engines.memory import MemoryEngine
from xvd.sim.prng import Prng


class SimStorage:
    """A memory engine behind a bridge; operations end in any order, now and then with an error."""

    def __init__(self, prng: Prng, size: int) -> None:
        self._prng = prng
        self._engine = MemoryEngine(size)
        self.channel = BridgeChannel()
        self._held: list[Operation] = []

    @property
    def held(self) -> int:
        """Operations submitted and not ended, after a look at what is new."""
        self._held += self.channel.take()
        return len(self._held)

    def finish_one(self, error_one_in: int) -> str:
        """End one of the held operations; what was done, for the trace."""
        operation = self._held.pop(self._prng.below(len(self._held)))
        if self._prng.chance(error_one_in):
            self._apply(operation, partly=True)
            operation.complete(errno.EIO)
            return f"{operation.kind} fails"
        self.perform(operation)
        operation.complete()
        return f"{operation.kind} done"

    def perform(self, operation: Operation) -> None:
        """Do all of an operation."""
        self._apply(operation, partly=False)

    def backend_died(self) -> None:
        """What was under way happens, or does not, or in part; a successor begins after that."""
        self._held += self.channel.take()
        for operation in self._held:
            if self._prng.chance(2):
                self._apply(operation, partly=self._prng.chance(2))
        self._held.clear()
        self.channel = BridgeChannel()

    def _apply(self, operation: Operation, *, partly: bool) -> None:
        """Do an operation, or a part of it: whole sectors in any number."""
        if operation.kind == "flush":
            return
        if operation.kind == "discard":
            if operation.length:
                self._engine.discard(operation.offset, operation.length)
            return
        at = operation.offset
        left = self._prng.below(operation.length // 512 + 1) * 512 if partly else operation.length
        for buffer in operation.buffers():
            part = buffer[:left]
            if operation.kind == "read":
                self._engine.read(part, at)
            else:
                self._engine.write(part, at)
            at += len(part)
            left -= len(part)
