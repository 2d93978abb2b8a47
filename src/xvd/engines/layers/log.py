# SPDX-License-Identifier: Apache-2.0
"""``log``: one line for each operation, with its outcome."""

import logging
from collections.abc import Callable

from xvd.engines.interface import Engine
from xvd.engines.layers.base import Layer, LayerKind
from xvd.errors import describe

logger = logging.getLogger(__name__)


class Log(Layer):
    """Writes ``read offset=8192 length=4096 ok`` and the like at level INFO."""

    def __init__(self, lower: Engine, emit: Callable[[str], None] = logger.info) -> None:
        super().__init__(lower)
        self._emit = emit

    def read(self, buffer: memoryview, offset: int) -> None:
        """Log and read."""
        self._run("read", offset, len(buffer), lambda: self.lower.read(buffer, offset))

    def write(self, buffer: memoryview, offset: int) -> None:
        """Log and write."""
        self._run("write", offset, len(buffer), lambda: self.lower.write(buffer, offset))

    def flush(self) -> None:
        """Log and flush."""
        self._run("flush", 0, 0, self.lower.flush)

    def discard(self, offset: int, length: int) -> None:
        """Log and discard."""
        self._run("discard", offset, length, lambda: self.lower.discard(offset, length))

    def secure_discard(self, offset: int, length: int) -> None:
        """Log and erase."""
        self._run("erase", offset, length, lambda: self.lower.secure_discard(offset, length))

    def _run(self, operation: str, offset: int, length: int, call: Callable[[], None]) -> None:
        try:
            call()
        except OSError as e:
            self._emit(f"{operation} offset={offset} length={length} failed: {describe(e)}")
            raise
        self._emit(f"{operation} offset={offset} length={length} ok")


LAYER = LayerKind("log", "logs a line for each operation", "log", lambda lower, _: Log(lower))
