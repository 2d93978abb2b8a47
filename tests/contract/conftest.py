# SPDX-License-Identifier: Apache-2.0
"""The machines of the contract suites as fixtures."""

import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
from rig_machine import KINDS, ON_XEN, Pair

from xvd.machine.emulated.limits import Limits

NOT_ON_XEN = {
    "books": "Xen keeps no books that a domain may read",
    "inject": "Xen fails when it fails",
    "OTHER": "needs a third domain",
    "no domain 99": "Linux's devices say so when a grant or port is used, not before",
    "tiny": "the limits of a real host are large",
    "revoke": "gntalloc's grants last as long as the page",
    "readonly=True": "gntalloc's grants are writable",
    "entry(": "a domain's grant table is its kernel's",
    ".bound": "the evtchn device does not tell",
}
"""What a test uses that real Xen has not, and why; looked for in the test's source."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if not ON_XEN or here not in item.path.parents or not isinstance(item, pytest.Function):
            continue
        if "pair" not in item.fixturenames and "tiny" not in item.fixturenames:
            item.add_marker(pytest.mark.skip(reason="has nothing to do with a Xen host"))
        source = inspect.getsource(item.function)
        for word, reason in NOT_ON_XEN.items():
            if word in source:
                item.add_marker(pytest.mark.skip(reason=reason))


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
