# SPDX-License-Identifier: Apache-2.0
"""Sizes, times and schemes as a user writes them; mistakes are told with their remedy."""

import re

import pytest

from xvd.engines.text import in_format, parse_size, parse_time
from xvd.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("4096", 4096), ("4K", 4096), ("4KiB", 4096), ("4KB", 4096), ("4 K", 4096),
     ("8s", 4096), ("1M", 1 << 20), (" 1G ", 1 << 30), ("2T", 2 << 40), ("1P", 1 << 50),
     ("512B", 512)],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "K", "-1", "1.G", "1X", "1KK", "0x10", "1k", "4 s", "8sK"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match=f"{re.escape(repr(text))} is no size; write bytes, or a"):
        parse_size(text)


@pytest.mark.parametrize(
    "text", ["9223372036854775807", "9223372036854775808", "8192P", "16384P", "99999999999G",
             "18014398509481984s", "8388608T"],
)  # fmt: skip
def test_a_size_that_no_disk_can_have(text: str) -> None:
    with pytest.raises(ConfigError, match=f"^{text!r} is too large; no disk has more than"):
        parse_size(text)


def test_the_largest_size() -> None:
    assert parse_size("18014398509481983s") == parse_size("9223372036854775296") == 2**63 - 512


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1s", 1.0), ("10ms", 0.01), ("250us", 0.00025), ("2", 2.0), ("1.5s", 1.5)],
)
def test_times(text: str, seconds: float) -> None:
    assert parse_time(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "-1s", "1m", "1h", "1 s", ".5s"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(ConfigError, match="is no time; write 10ms, 250us or 1s"):
        parse_time(text)


@pytest.mark.parametrize(
    ("target", "name", "uri"),
    [
        ("/a.img", "raw", "raw:/a.img"),
        ("file:/a.img", "raw", "raw:/a.img"),
        ("memory:1M", "raw", "memory:1M"),
        ("/a.img", "qcow2", "qcow2:/a.img"),
    ],
)
def test_a_target_in_a_format(target: str, name: str, uri: str) -> None:
    assert in_format(target, name) == uri
