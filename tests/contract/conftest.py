# SPDX-License-Identifier: Apache-2.0
"""The machines of the contract suites as fixtures."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from rig_machine import KINDS, LARGE_PAGES, ON_XEN, Pair

from xvd.machine.emulated.limits import Limits


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here not in item.path.parents or not isinstance(item, pytest.Function):
            continue
        reasons = []
        if "pair" not in item.fixturenames and "tiny" not in item.fixturenames:
            reasons.append("has nothing to do with a Xen host")
        if "tiny" in item.fixturenames:
            reasons.append("the limits of a real host are large")
        if ON_XEN and reasons:
            item.add_marker(pytest.mark.skip(reason=reasons[0]))


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pair(kind: str) -> Iterator[Pair]:
    """Two domains of a machine whose accounting must be empty at the end."""
    with KINDS[kind]() as domains:
        yield domains


@pytest.fixture(params=[kind for kind in KINDS if kind != LARGE_PAGES])
def tiny(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """The same with next to nothing of everything."""
    with KINDS[request.param](Limits(pages=16, grefs=24, tracks=6, ports=4)) as domains:
        yield domains
