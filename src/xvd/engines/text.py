# SPDX-License-Identifier: Apache-2.0
"""What a user writes for storage, taken apart: schemes, sizes, times and options."""

import re
from fractions import Fraction
from typing import Final

from xvd.errors import ConfigError
from xvd.types import RING_SECTOR_SIZE

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50}
_TIMES = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
_SCHEME = re.compile(r"([a-z][a-z0-9+]*):(.*)", re.DOTALL)

SIZE_MAX: Final = (1 << 63) - RING_SECTOR_SIZE
"""Bytes of the largest disk: offsets are signed numbers of 64 bits, and clients' too."""


def split_scheme(uri: str) -> tuple[str, str]:
    """Split a URI in its scheme and the rest; a bare path has an empty scheme."""
    match = _SCHEME.fullmatch(uri)
    return (match[1], match[2]) if match else ("", uri)


def in_format(target: str, name: str) -> str:
    """The URI of a target that somebody says has the format `name`: ``raw:/images/a.img``.

    Memory and the like are raw, and have no bytes that could be mistaken.
    """
    path = target.removeprefix("file:")
    scheme, _ = split_scheme(path)
    return target if name == "raw" and scheme else f"{name}:{path}"


def parse_size(text: str) -> int:
    """Bytes from ``4096``, ``4K``, ``1.5GiB``, ``8s`` (sectors of 512): units of 1024."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGTP]?)(?:i?B)?|(\d+)s", text.strip(), re.ASCII)
    if match is None:
        raise ConfigError(f"{text!r} is no size; write bytes, or a number with K, M, G, T or s")
    number, unit = Fraction(match[3] or match[1]), _UNITS.get(match[2], RING_SECTOR_SIZE)
    size = number * unit
    if size > SIZE_MAX:
        raise ConfigError(f"{text!r} is too large; no disk has more than {SIZE_MAX} bytes (8191P)")
    if size.denominator != 1:
        raise ConfigError(f"{text!r} is no whole number of bytes; write {int(size)}, or another")
    return int(size)


def parse_disk_size(text: str) -> int:
    """Parse the size of a disk, as `parse_size`: whole sectors, at least one."""
    size = parse_size(text)
    if size == 0 or size % RING_SECTOR_SIZE:
        raise ConfigError(
            f"{text!r} is no size of a disk: a multiple of {RING_SECTOR_SIZE}, above 0"
        )
    return size


def parse_time(text: str) -> float:
    """Seconds from ``10ms``, ``250us``, ``1s`` or a bare number of seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|ms|us)?", text.strip())
    if match is None:
        raise ConfigError(f"{text!r} is no time; write 10ms, 250us or 1s")
    return float(match[1]) * _TIMES[match[2] or "s"]


def parse_options(text: str) -> dict[str, str]:
    """A layer's options by name, from ``read=1ms,write=2ms``."""
    pairs = [part.partition("=") for part in text.split(",") if part]
    if any(not sep for _, sep, _ in pairs):
        raise ConfigError(f"layer options are key=value, separated by commas, not {text!r}")
    return {key: value for key, _, value in pairs}
