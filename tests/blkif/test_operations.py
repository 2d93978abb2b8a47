# SPDX-License-Identifier: Apache-2.0
"""The table of operations: nothing is missing in it, and nothing contradicts another table."""

import pytest

from xvd.blkif.abi import Op
from xvd.blkif.nodes import NODES, Side
from xvd.blkif.operations import (
    ALWAYS_OFFERED,
    OFFER_SECURE,
    OFFERED_BY,
    OPERATIONS,
    Data,
    Operation,
    Shape,
)
from xvd.types import EngineOp

ROWS = pytest.mark.parametrize("row", OPERATIONS, ids=lambda row: row.op.name)


def test_every_operation_has_one_row_in_order() -> None:
    assert [row.op for row in OPERATIONS] == sorted(set(Op) - {Op.RESERVED_1})


@ROWS
def test_what_moves_data_asks_the_storage_to_move_it(row: Operation) -> None:
    moved = {Data.NONE: set(), Data.FROM_DISK: {EngineOp.READ}, Data.TO_DISK: {EngineOp.WRITE}}

    assert set(row.asked) & {EngineOp.READ, EngineOp.WRITE} == moved[row.data]


@ROWS
def test_an_operation_is_asked_for_if_its_slot_says_what_it_does(row: Operation) -> None:
    """An indirect request is done as the operation inside it."""
    assert bool(row.asked) == (row.shape is not Shape.INDIRECT)


def test_what_is_offered_are_bits_of_their_own() -> None:
    bits = [ALWAYS_OFFERED, *OFFERED_BY.values()]

    assert sum(bits) == OFFER_SECURE | sum(1 << row.op for row in OPERATIONS)


def test_the_nodes_that_offer_an_operation_are_a_backends() -> None:
    assert {(Side.BACKEND, name) for name in OFFERED_BY} <= NODES.keys()
