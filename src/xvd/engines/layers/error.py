# SPDX-License-Identifier: Apache-2.0
"""``error``: storage that fails now and then, the same way for the same seed."""

import errno as errno_names
import random
from collections.abc import Callable, Collection, Mapping

from xvd.engines.interface import Engine
from xvd.engines.layers.base import OPERATIONS, Asked, Layer, LayerKind
from xvd.errors import ConfigError, EngineError


class Error(Layer):
    """Fails `one_in`-th operations on average (1 fails all), drawn from `seed`.

    operations: which kinds may fail. error: the errno they fail with.
    """

    def __init__(
        self,
        lower: Engine,
        *,
        one_in: int = 10,
        seed: int = 0,
        operations: Collection[str] = OPERATIONS,
        error: int = errno_names.EIO,
    ) -> None:
        super().__init__(lower)
        self.failed = 0
        self._one_in = one_in
        self._random = random.Random(seed)
        self._operations = frozenset(operations)
        self._error = error

    def perform(self, asked: Asked, do: Callable[[], None]) -> None:
        """Fail, or do it."""
        if asked.kind in self._operations and self._random.randrange(self._one_in) == 0:
            self.failed += 1
            raise EngineError(self._error, f"{asked.kind} failed on request of the error layer")
        do()


def _positive(options: Mapping[str, str], key: str, least: int) -> int:
    text = options[key]
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"{key}= takes a positive number, not {text!r}")
    return int(text)


def _make(lower: Engine, options: Mapping[str, str]) -> Engine:
    named, kinds = options["errno"], options["on"].split("+")
    if not isinstance(getattr(errno_names, named, None), int):
        raise ConfigError(f"there is no errno {named!r}; write a name like EIO or ENOSPC")
    if not set(kinds) <= set(OPERATIONS):
        raise ConfigError(f"on= takes {', '.join(OPERATIONS)}, joined by +, not {'+'.join(kinds)}")
    return Error(
        lower,
        one_in=_positive(options, "one_in", 1),
        seed=_positive(options, "seed", 0),
        operations=kinds,
        error=getattr(errno_names, named),
    )


LAYER = LayerKind(
    "error",
    "fails some operations, the same ones for the same seed",
    "error:one_in=10,seed=1",
    _make,
    {"one_in": "10", "seed": "0", "on": "+".join(OPERATIONS), "errno": "EIO"},
)
