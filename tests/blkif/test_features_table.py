# SPDX-License-Identifier: Apache-2.0
"""The table of what a backend offers: whole, and what is done by its rows."""

from dataclasses import fields, replace

import pytest

from xvd.blkif.abi import InfoFlag, Op
from xvd.blkif.features import (
    FEATURES,
    BackendFeatures,
    Feature,
    format_backend,
    format_offer,
    offered_operations,
    promised,
    useful_indirect,
    without,
)
from xvd.blkif.nodes import NODES, Side
from xvd.blkif.operations import OFFER_SECURE, OFFERED_BY

RICH = BackendFeatures(
    sectors=4096, info=InfoFlag.CDROM, sector_size=4096, physical_sector_size=8192, flush=True,
    barrier=True, discard=True, discard_granularity=65536, discard_alignment=4096,
    discard_secure=True, persistent=True, max_indirect_segments=64, max_ring_page_order=3,
    max_queues=5,
)  # fmt: skip
POOR = BackendFeatures(sectors=2048, flush=False)
ROWS = pytest.mark.parametrize("row", FEATURES, ids=lambda row: row.node)


def test_every_field_has_one_row_but_that_of_the_dialect() -> None:
    names = [one.name for one in fields(BackendFeatures)]

    assert sorted([*(row.field for row in FEATURES), "wire_sector"]) == sorted(names)


def test_every_node_that_offers_an_operation_has_a_row() -> None:
    assert {row.node for row in FEATURES if row.bit} == set(OFFERED_BY)


@ROWS
def test_a_row_is_of_a_node_that_a_backend_writes(row: Feature) -> None:
    assert NODES[Side.BACKEND, row.node].writer == "backend"


@ROWS
def test_what_is_written_is_read_again(row: Feature) -> None:
    assert row.parse(int(row.format(RICH))) == getattr(RICH, row.field)


def test_what_stands_is_the_predecessors_and_the_rest_is_ours() -> None:
    published = dict(format_backend(RICH).write)

    agreed = promised(POOR, published)

    assert agreed == replace(
        RICH, info=POOR.info, sector_size=512, physical_sector_size=512, discard_granularity=0,
        discard_alignment=0,
    )  # fmt: skip


def test_a_disk_does_not_shrink_under_its_frontend() -> None:
    published = dict(format_backend(POOR).write)

    assert promised(RICH, published).sectors == RICH.sectors


@pytest.mark.parametrize(
    ("bits", "gone"),
    [
        (0, set()),
        (1 << Op.FLUSH_DISKCACHE, {"flush"}),
        (1 << Op.WRITE_BARRIER, {"barrier"}),
        (1 << Op.DISCARD, {"discard", "discard_secure"}),
        (OFFER_SECURE, {"discard_secure"}),
        (1 << Op.FLUSH_DISKCACHE | OFFER_SECURE, {"flush", "discard_secure"}),
    ],
)
def test_what_the_storage_withdraws_goes_with_what_needs_it(bits: int, gone: set[str]) -> None:
    left = without(RICH, bits)

    assert left == replace(RICH, **dict.fromkeys(gone, False))
    assert not offered_operations(left) & bits


def test_what_goes_with_init_wait_is_what_a_frontend_allocates_by() -> None:
    assert dict(format_offer(RICH).write) == {
        "max-ring-page-order": "3",
        "multi-queue-max-queues": "5",
        "feature-max-indirect-segments": "64",
    }


def test_the_details_of_discard_are_there_with_it_only() -> None:
    details = {"discard-granularity", "discard-alignment", "discard-secure"}

    assert details <= set(format_backend(RICH).write)
    assert set(format_backend(POOR).remove) == details | {"max-ring-pages"}


@pytest.mark.parametrize(
    ("segments", "useful"), [(0, 0), (11, 0), (12, 12), (4096, 4096), (5000, 4096)]
)
def test_an_indirect_request_holds_more_than_a_direct_one(segments: int, useful: int) -> None:
    assert useful_indirect(segments) == useful
