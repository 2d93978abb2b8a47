# SPDX-License-Identifier: Apache-2.0
"""``readonly``: whatever is behind, this disk is not written to."""

import dataclasses
import errno

from xvd.engines.interface import EngineInfo
from xvd.engines.layers.base import Layer, LayerKind
from xvd.errors import EngineError


class ReadOnly(Layer):
    """Refuses writes and discards with EROFS, and says so beforehand."""

    @property
    def info(self) -> EngineInfo:
        """The info of the engine behind, read-only."""
        return dataclasses.replace(
            super().info, read_only=True, can_discard=False, can_secure_discard=False
        )

    def write(self, buffer: memoryview, offset: int) -> None:
        """Refuse."""
        raise EngineError(errno.EROFS, "the disk is read-only by its readonly layer")

    def discard(self, offset: int, length: int) -> None:
        """Refuse."""
        raise EngineError(errno.EROFS, "the disk is read-only by its readonly layer")

    def secure_discard(self, offset: int, length: int) -> None:
        """Refuse."""
        raise EngineError(errno.EROFS, "the disk is read-only by its readonly layer")

    def resize(self, size: int) -> None:
        """Refuse."""
        raise EngineError(errno.EROFS, "the disk is read-only by its readonly layer")


LAYER = LayerKind(
    "readonly", "refuses writes and discards", "readonly", lambda lower, _: ReadOnly(lower)
)
