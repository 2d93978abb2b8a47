# SPDX-License-Identifier: Apache-2.0
"""The computed layouts against the figures that Xen's documentation and compilers give."""

import pytest

from xvd.blkif import abi
from xvd.blkif.abi import Abi, nr_ents


@pytest.mark.parametrize(
    ("one", "request_size", "discard", "indirect", "response"),
    [
        (Abi.X86_64, 112, 32, 64, 16),
        (Abi.X86_32, 108, 28, 64, 12),
        (Abi.ARM, 112, 32, 64, 16),
    ],
)
def test_struct_sizes(
    one: Abi, request_size: int, discard: int, indirect: int, response: int
) -> None:
    structs = (abi.REQUEST, abi.DISCARD, abi.INDIRECT, abi.RESPONSE)

    sizes = tuple(one.size(struct) for struct in structs)

    assert sizes == (request_size, discard, indirect, response)
    assert one.entry_size == request_size


@pytest.mark.parametrize("one", list(Abi))
@pytest.mark.parametrize("order", range(7))
def test_a_ring_has_32_slots_per_page_in_every_practical_size(one: Abi, order: int) -> None:
    assert nr_ents(1 << order, one) == 32 << order


def test_a_ring_without_pages_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one page"):
        nr_ents(0, Abi.X86_64)


@pytest.mark.parametrize("one", list(Abi))
def test_an_abi_is_found_by_its_protocol_string(one: Abi) -> None:
    assert Abi.from_protocol(one.protocol) is one


def test_an_unknown_protocol_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'ia64-abi'; known are x86_64-abi, x86_32-abi"):
        Abi.from_protocol("ia64-abi")


@pytest.mark.parametrize(
    ("machine", "bits", "expected"),
    [
        ("x86_64", 64, Abi.X86_64),
        ("x86_64", 32, Abi.X86_32),
        ("i686", 32, Abi.X86_32),
        ("aarch64", 64, Abi.ARM),
        ("armv7l", 32, Abi.ARM),
    ],
)
def test_native_abi(machine: str, bits: int, expected: Abi) -> None:
    assert Abi.native(machine, bits) is expected


def test_numbers_of_the_header_are_in_order() -> None:
    assert [one.number for one in Abi] == list(range(len(Abi)))
