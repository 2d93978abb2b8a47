# SPDX-License-Identifier: Apache-2.0
"""``log``: one line for each operation, with its outcome."""

import logging
from collections.abc import Callable

from xvd.engines.interface import Engine
from xvd.engines.layers.base import Asked, Layer, LayerKind
from xvd.errors import describe

logger = logging.getLogger(__name__)


class Log(Layer):
    """Writes ``read offset=8192 length=4096 ok`` and the like at level INFO."""

    def __init__(self, lower: Engine, emit: Callable[[str], None] = logger.info) -> None:
        super().__init__(lower)
        self._emit = emit

    def perform(self, asked: Asked, do: Callable[[], None]) -> None:
        """Do it and log it."""
        word = "erase" if asked.secure else asked.kind
        line = f"{word} offset={asked.offset} length={asked.length}"
        try:
            do()
        except OSError as e:
            self._emit(f"{line} failed: {describe(e)}")
            raise
        self._emit(f"{line} ok")


LAYER = LayerKind("log", "logs a line for each operation", "log", lambda lower, _: Log(lower))
