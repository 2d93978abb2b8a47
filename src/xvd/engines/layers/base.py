# SPDX-License-Identifier: Apache-2.0
"""What every layer is: an engine that passes everything on, to be overridden where it does not."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

from xvd.engines.interface import Engine, EngineInfo

OPERATIONS = ("read", "write", "flush", "discard")
"""The kinds of operations that layers tell apart, under the names of their options."""


class Layer(Engine):
    """Passes everything to `lower`. A layer is called in Python, whatever is behind it,
    unless it has a compiled channel of its own.
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

    def read(self, buffer: memoryview, offset: int) -> None:
        """Pass on."""
        self.lower.read(buffer, offset)

    def write(self, buffer: memoryview, offset: int) -> None:
        """Pass on."""
        self.lower.write(buffer, offset)

    def flush(self) -> None:
        """Pass on."""
        self.lower.flush()

    def discard(self, offset: int, length: int) -> None:
        """Pass on."""
        self.lower.discard(offset, length)

    def secure_discard(self, offset: int, length: int) -> None:
        """Pass on."""
        self.lower.secure_discard(offset, length)

    def measure(self) -> int:
        """Pass on."""
        return self.lower.measure()

    def resize(self, size: int) -> None:
        """Pass on."""
        self.lower.resize(size)

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
    where they are not said.
    """

    name: str
    help: str
    example: str
    make: Callable[[Engine, Mapping[str, str]], Engine]
    options: Mapping[str, str] = {}
