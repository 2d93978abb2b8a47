# SPDX-License-Identifier: Apache-2.0
"""From what the user writes to an open engine: URIs, sizes, times, and chains of layers.

``file:PATH`` or a bare path, ``raw:PATH`` where it is raw although its bytes look like another
format, both with ``,detect-zeroes=unmap`` (on, off) behind; ``memory:SIZE``, ``null:SIZE``
(``null:SIZE,read-zeroes=off`` leaves what is read as it was); layers as ``NAME`` or
``NAME:key=value,key=value``, the first one nearest to the guest.
"""

import errno
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Final

from xvd.engines import formats
from xvd.engines.checked import Checked
from xvd.engines.file import ZEROES
from xvd.engines.image import FileEngine
from xvd.engines.interface import Engine
from xvd.engines.layers.delay import Delay
from xvd.engines.layers.error import OPERATIONS, Error
from xvd.engines.layers.log import Log
from xvd.engines.layers.readonly import ReadOnly
from xvd.engines.layers.stats import Stats
from xvd.engines.memory import MemoryEngine
from xvd.engines.null import NullEngine
from xvd.errors import ConfigError

_UNITS = {"": 1, "s": 512, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50}
_TIMES = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
_READ_ZEROES = {"read-zeroes=on": True, "read-zeroes=off": False}
_ZEROES = re.compile(r"(.+),detect-zeroes=([^,=/]*)", re.DOTALL)
SIZE_MAX: Final = (1 << 63) - 512
"""Bytes of the largest disk: offsets are signed numbers of 64 bits, and clients' too."""
_SCHEME = re.compile(r"([a-z][a-z0-9+]*):(.*)", re.DOTALL)


def parse_size(text: str) -> int:
    """Bytes from ``4096``, ``4K``, ``1.5GiB``, ``8s`` (sectors of 512): units of 1024."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGTP]?)(?:i?B)?|(\d+)s", text.strip(), re.ASCII)
    if match is None:
        raise ConfigError(f"{text!r} is no size; write bytes, or a number with K, M, G, T or s")
    size = Fraction(match[3]) * 512 if match[3] else Fraction(match[1]) * _UNITS[match[2]]
    if size > SIZE_MAX:
        raise ConfigError(f"{text!r} is too large; no disk has more than {SIZE_MAX} bytes (8191P)")
    if size.denominator != 1:
        raise ConfigError(f"{text!r} is no whole number of bytes; write {int(size)}, or another")
    return int(size)


def parse_time(text: str) -> float:
    """Seconds from ``10ms``, ``250us``, ``1s`` or a bare number of seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|ms|us)?", text.strip())
    if match is None:
        raise ConfigError(f"{text!r} is no time; write 10ms, 250us or 1s")
    return float(match[1]) * _TIMES[match[2] or "s"]


@dataclass(frozen=True, slots=True)
class Opening:
    """How storage is opened, whatever it is.

    patience_s: how long to wait for a lock. user: for whom it is. device_model: whether a QEMU of
    the same guest has it too.
    """

    read_only: bool = False
    patience_s: float = 0.0
    user: str = ""
    device_model: bool = False


def _file(rest: str, how: Opening, *, raw: bool = False) -> Engine:
    path, zeroes = rest, "off"
    match = _ZEROES.fullmatch(rest)
    if match and not os.path.lexists(rest):  # a file of that name is what is meant
        path, zeroes = match[1], match[2]
        if zeroes not in ZEROES:
            raise ConfigError(f"detect-zeroes takes {', '.join(ZEROES)}, not {zeroes!r}")
    return FileEngine(
        path,
        read_only=how.read_only,
        patience_s=how.patience_s,
        raw=raw,
        detect_zeroes=zeroes,
        user=how.user,
        device_model=how.device_model,
    )


def _sized(make: Callable[[int], Engine]) -> Callable[[str, Opening], Engine]:
    def build(rest: str, how: Opening) -> Engine:
        size = parse_size(rest)
        if size == 0 or size % 512:
            raise ConfigError(f"{rest!r} is no size of a disk: a multiple of 512, above 0")
        engine = make(size)
        return ReadOnly(engine) if how.read_only else engine

    return build


def _null(rest: str, how: Opening) -> Engine:
    size, comma, word = rest.partition(",")
    if comma and word not in _READ_ZEROES:
        raise ConfigError(f"null: takes {' or '.join(_READ_ZEROES)} after its size, not {word!r}")
    make = partial(NullEngine, read_zeroes=_READ_ZEROES.get(word, True))
    return _sized(make)(size, how)


SCHEMES: dict[str, Callable[[str, Opening], Engine]] = {
    "file": _file,
    "memory": _sized(MemoryEngine),
    "null": _null,
    "raw": partial(_file, raw=True),
}
"""Engine URI schemes: (rest of the URI, how it is opened) -> engine."""


def _split(uri: str) -> tuple[str, str]:
    match = _SCHEME.fullmatch(uri)
    return (match[1], match[2]) if match else ("file", uri)


def _unknown(scheme: str, rest: str, uri: str) -> ConfigError:
    if name := formats.format_named(scheme):
        return ConfigError(
            f"{uri!r}: what is in a {name} image is not served here, only raw bytes are: "
            f"{formats.remedy(name, rest)}"
        )
    known = ", ".join(f"{name}:" for name in sorted(SCHEMES))
    return ConfigError(f"unknown storage {uri!r}; there are {known} and a bare path is a file")


def _options(text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",") if part]
    if any(not sep for _, sep, _ in pairs):
        raise ConfigError(f"layer options are key=value, separated by commas, not {text!r}")
    return {key: value for key, _, value in pairs}


def _delay(lower: Engine, options: dict[str, str]) -> Engine:
    read_s, write_s, flush_s, discard_s = (parse_time(options.pop(k, "0")) for k in OPERATIONS)
    return Delay(lower, read_s=read_s, write_s=write_s, flush_s=flush_s, discard_s=discard_s)


def _error(lower: Engine, options: dict[str, str]) -> Engine:
    named = options.pop("errno", "EIO")
    if not isinstance(getattr(errno, named, None), int):
        raise ConfigError(f"there is no errno {named!r}; write a name like EIO or ENOSPC")
    kinds = options.pop("on", "+".join(OPERATIONS)).split("+")
    if not set(kinds) <= set(OPERATIONS):
        raise ConfigError(f"on= takes {', '.join(OPERATIONS)}, joined by +, not {'+'.join(kinds)}")
    defaults = {"one_in": "10", "seed": "0"}
    numbers = {key: options.pop(key, default) for key, default in defaults.items()}
    for key, value in numbers.items():
        if not value.isdecimal() or (key == "one_in" and int(value) == 0):
            raise ConfigError(f"{key}= takes a positive number, not {value!r}")
    return Error(
        lower,
        one_in=int(numbers["one_in"]),
        seed=int(numbers["seed"]),
        operations=kinds,
        error=getattr(errno, named),
    )


LAYERS: dict[str, Callable[[Engine, dict[str, str]], Engine]] = {
    "delay": _delay,
    "error": _error,
    "readonly": lambda lower, options: ReadOnly(lower),
    "stats": lambda lower, options: Stats(lower),
    "log": lambda lower, options: Log(lower),
}
"""Layer names: (engine behind, options) -> layer; a layer removes the options that it knows."""


LAYER_OPTIONS: dict[str, Sequence[str]] = {
    "delay": OPERATIONS,
    "error": ("one_in", "seed", "on", "errno"),
}
"""The options of each layer that has any."""


def add_layer(lower: Engine, text: str) -> Engine:
    """Put the layer that `text` describes in front; raises `ConfigError`."""
    name, _, rest = text.partition(":")
    if name not in LAYERS:
        raise ConfigError(f"there is no layer {name!r}; there are {', '.join(sorted(LAYERS))}")
    options = _options(rest)
    layer = LAYERS[name](lower, options)
    if options:
        wrong, known = ", ".join(sorted(options)), ", ".join(LAYER_OPTIONS.get(name, ()))
        has = f"its options are {known}" if known else "it has none"
        raise ConfigError(f"layer {name} has no option {wrong}; {has}")
    return layer


def open_engine(
    uri: str,
    *,
    read_only: bool = False,
    layers: Sequence[str] = (),
    patience_s: float = 0.0,
    user: str = "",
    device_model: bool = False,
) -> Engine:
    """Open what `uri` names, with `layers` in front and checked.

    user: whose disk it is, for the words to another one that wants the same image. device_model:
    a QEMU of the same guest has the image open as well. Raises
    `ConfigError` for what cannot be understood, `EngineError` for what cannot be opened.
    """
    scheme, rest = _split(uri)
    if scheme not in SCHEMES:
        raise _unknown(scheme, rest, uri)
    if not rest:
        raise ConfigError(f"{uri!r} names no storage; write a path or a size after {scheme}:")
    engine = SCHEMES[scheme](rest, Opening(read_only, patience_s, user, device_model))
    try:
        for text in reversed(layers):
            engine = add_layer(engine, text)
        return Checked(engine)
    except BaseException:
        engine.close()
        raise
