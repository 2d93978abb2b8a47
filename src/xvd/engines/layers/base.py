# SPDX-License-Identifier: Apache-2.0
"""What every layer is: an engine that passes everything on, to be overridden where it does not."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

from xvd.engines.info import Snapshot, SnapshotAction
from xvd.engines.interface import Engine, EngineInfo
from xvd.types import EngineOp

OPERATIONS = tuple(op.name.lower() for op in EngineOp)
"""The kinds of operations that layers tell apart, under the names of their options."""


class Asked(NamedTuple):
    """An operation that reaches a layer: bytes. A secure discard erases."""

    op: EngineOp
    offset: int = 0
    length: int = 0
    secure: bool = False

    @property
    def kind(self) -> str:
        """One of `OPERATIONS`."""
        return OPERATIONS[self.op]


class Layer(Engine):
    """Passes everything to `lower`, operations by way of `perform`. A layer is called in Python,
    whatever is behind it, unless it has a compiled channel of its own.
    """

    def __init__(self, lower: Engine) -> None:
        self.lower = lower

    @property
    def info(self) -> EngineInfo:
        """The info of the engine behind; where it has holes is not asked past a layer."""
        return dataclasses.replace(self.lower.info, tells_holes=False)

    @property
    def trouble(self) -> str:
        """That of the engine behind."""
        return self.lower.trouble

    @property
    def identity(self) -> str:
        """Which storage is behind."""
        return self.lower.identity

    def perform(self, asked: Asked, do: Callable[[], None]) -> None:
        """Do one operation; what stands before it, behind it or in its place overrides this.

        do: the operation on the engine behind.
        """
        do()

    def read(self, buffer: memoryview, offset: int) -> None:
        """Read by way of `perform`, as everything below."""
        asked = Asked(EngineOp.READ, offset, buffer.nbytes)
        self.perform(asked, lambda: self.lower.read(buffer, offset))

    def write(self, buffer: memoryview, offset: int) -> None:
        """Write."""
        asked = Asked(EngineOp.WRITE, offset, buffer.nbytes)
        self.perform(asked, lambda: self.lower.write(buffer, offset))

    def flush(self) -> None:
        """Flush."""
        self.perform(Asked(EngineOp.FLUSH), self.lower.flush)

    def discard(self, offset: int, length: int) -> None:
        """Discard."""
        asked = Asked(EngineOp.DISCARD, offset, length)
        self.perform(asked, lambda: self.lower.discard(offset, length))

    def secure_discard(self, offset: int, length: int) -> None:
        """Erase."""
        asked = Asked(EngineOp.DISCARD, offset, length, secure=True)
        self.perform(asked, lambda: self.lower.secure_discard(offset, length))

    def measure(self) -> int:
        """Pass on."""
        return self.lower.measure()

    def resize(self, size: int) -> None:
        """Pass on."""
        self.lower.resize(size)

    def snapshots(self) -> list[Snapshot]:
        """Pass on."""
        return self.lower.snapshots()

    def snapshot(self, action: SnapshotAction, name: str) -> None:
        """Pass on."""
        self.lower.snapshot(action, name)

    def accept_size(self) -> None:
        """Pass on."""
        self.lower.accept_size()

    def close(self) -> None:
        """Close what is behind."""
        self.lower.close()


class LayerKind(NamedTuple):
    """A layer by its name: its file has it as `LAYER`.

    help: what it does. example: how it is written. make: the engine behind it, and every option's
    text -> the layer; it raises `ConfigError`. options: those that it has, with what they are
    where they are not said. only_reads: whether what is behind is never written to. files: the
    files that it makes where they are not there, by its options.
    """

    name: str
    help: str
    example: str
    make: Callable[[Engine, Mapping[str, str]], Engine]
    options: Mapping[str, str] = {}
    only_reads: bool = False
    files: Callable[[Mapping[str, str]], tuple[str, ...]] = lambda _: ()
