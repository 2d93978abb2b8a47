# SPDX-License-Identifier: Apache-2.0
"""The machines of the contract suites as fixtures."""

from collections.abc import Iterator

import pytest
from rig_machine import KINDS, Pair

from xvd.machine.emulated.host import Limits


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pair(kind: str) -> Iterator[Pair]:
    """Two domains of a machine whose books must be empty at the end."""
    with KINDS[kind]() as domains:
        yield domains


@pytest.fixture
def tiny(kind: str) -> Iterator[Pair]:
    """The same with next to nothing of everything."""
    with KINDS[kind](Limits(pages=16, grefs=24, tracks=6, ports=4)) as domains:
        yield domains
