# SPDX-License-Identifier: Apache-2.0
"""``detect-zeroes``: a write of zeros needs no data, and no space, where the storage can do without
(zeroes.pyx)."""

from collections.abc import Mapping
from typing import Final

from xvd.engines.interface import Channel, Engine, EngineInfo, Extent
from xvd.engines.layers.base import Layer, LayerKind
from xvd.engines.zeroes import ZeroesChannel, all_zero
from xvd.errors import ConfigError

_SWITCH: Final = {"on": True, "off": False}


class DetectZeroes(Layer):
    """Everything goes to `lower`; a write that is of zeros as a whole, with word of that.

    unmap: whether zeros need no space.
    """

    def __init__(self, lower: Engine, *, unmap: bool = True) -> None:
        super().__init__(lower)
        self._unmap = unmap

    @property
    def info(self) -> EngineInfo:
        """The info of the engine behind, all of it: nothing is where that does not have it."""
        return self.lower.info

    def write(self, buffer: memoryview, offset: int) -> None:
        """Write, or let the storage have zeros; where it has none but data, as data."""
        if not all_zero(buffer):
            self.lower.write(buffer, offset)
            return
        try:
            self.lower.write_zeroes(offset, buffer.nbytes, unmap=self._unmap)
        except OSError:  # if it is a lasting fault, the write has it too
            self.lower.write(memoryview(bytes(buffer.nbytes)), offset)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """Pass on."""
        self.lower.write_zeroes(offset, length, unmap=unmap)

    def extents(self, offset: int, length: int, most: int) -> list[Extent]:
        """Pass on."""
        return self.lower.extents(offset, length, most)

    def open_channel(self) -> Channel:
        """A compiled channel in front of the storage's."""
        return ZeroesChannel(self.lower.open_channel(), unmap=self._unmap)


def _make(lower: Engine, options: Mapping[str, str]) -> Engine:
    unmap = options["unmap"]
    if unmap not in _SWITCH:
        raise ConfigError(f"unmap= takes {' or '.join(_SWITCH)}, not {unmap!r}")
    return DetectZeroes(lower, unmap=_SWITCH[unmap])


LAYER = LayerKind(
    "detect-zeroes",
    "lets writes of zeros be holes, or with unmap=off zeros that keep their space",
    "detect-zeroes:unmap=off",
    _make,
    {"unmap": "on"},
)
