# SPDX-License-Identifier: Apache-2.0
"""``readonly``: whatever is behind, this disk is not written to."""

import dataclasses
import errno
from collections.abc import Callable

from xvd.engines.interface import EngineInfo
from xvd.engines.layers.base import Asked, Layer, LayerKind
from xvd.errors import EngineError
from xvd.types import EngineOp


class ReadOnly(Layer):
    """Refuses writes and discards with EROFS, and says so beforehand."""

    @property
    def info(self) -> EngineInfo:
        """The info of the engine behind, read-only."""
        return dataclasses.replace(
            super().info, read_only=True, can_discard=False, can_secure_discard=False
        )

    def perform(self, asked: Asked, do: Callable[[], None]) -> None:
        """Refuse what changes anything."""
        if asked.op in (EngineOp.WRITE, EngineOp.DISCARD):
            raise self._refusal()
        do()

    def resize(self, _size: int) -> None:
        """Refuse."""
        raise self._refusal()

    @staticmethod
    def _refusal() -> EngineError:
        return EngineError(errno.EROFS, "the disk is read-only by its readonly layer")


LAYER = LayerKind(
    "readonly", "refuses writes and discards", "readonly", lambda lower, _: ReadOnly(lower)
)
