# SPDX-License-Identifier: Apache-2.0
"""Disk names and numbers, in the toolstack's own table, both ways."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xvd.blkif.vdev import MAX_VDEV, format_vdev, handle, parse_vdev

TABLE = [
    ("xvda", 51712),
    ("xvda1", 51713),
    ("xvdp15", 51967),
    ("xvdb", 51728),
    ("xvda16", (1 << 28) | 16),
    ("xvdq", (1 << 28) | 16 << 8),
    ("xvdq255", (1 << 28) | 16 << 8 | 255),
    ("xvdz", (1 << 28) | 25 << 8),
    ("xvdaa", (1 << 28) | 26 << 8),
    ("xvdba3", (1 << 28) | 52 << 8 | 3),
    ("sda", 2048),
    ("sdp15", 2303),
    ("hda", 768),
    ("hdb63", 768 + 64 + 63),
    ("hdc", 5632),
    ("hdd1", 5632 + 65),
]


@pytest.mark.parametrize(("name", "number"), TABLE)
def test_a_name_has_its_number(name: str, number: int) -> None:
    assert parse_vdev(name) == number


@pytest.mark.parametrize(("name", "number"), TABLE)
def test_a_number_has_its_name(name: str, number: int) -> None:
    assert format_vdev(number) == name


@pytest.mark.parametrize(
    ("text", "name"),
    [("d0", "xvda"), ("d0p1", "xvda1"), ("d16p0", "xvdq"), ("51712", "xvda"), ("0xca01", "xvda1")],
)
def test_other_spellings(text: str, name: str) -> None:
    assert format_vdev(parse_vdev(text)) == name


@pytest.mark.parametrize(
    "text",
    [
        "",
        "xvd",
        "xvda256",
        "xvda01",
        "sdq",
        "sda16",
        "hde",
        "hda64",
        "vda",
        "d",
        "d0p",
        "d1048576",
        "xvd" + "z" * 5,
        "536870912",
        "-1",
        "xvda\n",
        "xvdä",
        "٣",
    ],
)
def test_what_names_no_device_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="virtual device"):
        parse_vdev(text)


def test_the_refusal_says_what_to_write() -> None:
    with pytest.raises(ValueError, match="write it as xvda, xvdb1, d2p1 or 51712"):
        parse_vdev("disk0")


def test_a_number_without_a_name_is_shown_as_it_is() -> None:
    assert format_vdev(1) == "1"


@pytest.mark.parametrize("number", [-1, MAX_VDEV + 1])
def test_reserved_numbers_are_refused(number: int) -> None:
    with pytest.raises(ValueError, match="reserved"):
        format_vdev(number)


@given(disk=st.integers(0, 2**20 - 1), partition=st.integers(0, 255))
def test_every_xvd_disk_comes_back(disk: int, partition: int) -> None:
    number = parse_vdev(f"d{disk}p{partition}")

    assert parse_vdev(format_vdev(number)) == number


@given(number=st.integers(0, MAX_VDEV))
def test_every_number_has_a_text_that_is_read_again(number: int) -> None:
    text = format_vdev(number)

    assert format_vdev(parse_vdev(text)) == text


def test_a_handle_is_the_low_half() -> None:
    assert handle(parse_vdev("xvdq1")) == 0x1001
