# SPDX-License-Identifier: Apache-2.0
"""Our store against Debian's C xenstored: the same operations, word for word the same answers."""

from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import count
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from xenstore_operations import Conversation
from xenstored_oracle import Oracle, Ours, build_shim

from xvd.machine.emulated.xenstore_domains import Quotas

pytestmark = [pytest.mark.tools, pytest.mark.slow]

SMALL_QUOTAS = Quotas(
    nodes=12,
    watches=4,
    transactions=2,
    node_size=300,
    permissions=3,
    transaction_nodes=9,
    path_max=200,
)

Talk = Callable[[Random, Quotas, bool], Conversation]


@pytest.fixture(scope="session")
def shim(
    requires_tool: Callable[[str, str], str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    requires_tool("/usr/include/xengnttab.h", "libxen-dev")
    return build_shim(requires_tool("gcc", "gcc"), tmp_path_factory.mktemp("shim"))


@pytest.fixture
def talk(shim: Path, requires_tool: Callable[[str, str], str], tmp_path: Path) -> Iterator[Talk]:
    """Start both stores and a conversation with them; all ends with the test."""
    xenstored = requires_tool("/usr/lib/xen-4.17/bin/xenstored", "xen-utils-4.17")
    open_ones: list[closing[Conversation] | closing[Oracle] | closing[Ours]] = []
    numbers = count()

    def start(random: Random, quotas: Quotas, targets: bool) -> Conversation:
        end_all()
        directory = tmp_path / str(next(numbers))
        oracle = Oracle(xenstored, shim, directory / "theirs", quotas)
        open_ones.append(closing(oracle))
        ours = Ours(directory / "ours", quotas)
        open_ones.append(closing(ours))
        conversation = Conversation(oracle, ours, random, targets)
        open_ones.append(closing(conversation))
        return conversation

    def end_all() -> None:
        while open_ones:
            open_ones.pop().thing.close()

    yield start
    end_all()


@pytest.mark.parametrize("targets", [False, True], ids=["domains-end", "targets"])
@pytest.mark.parametrize("quotas", [Quotas(), SMALL_QUOTAS], ids=["defaults", "small-quotas"])
@pytest.mark.parametrize("seed", [1])
def test_ten_thousand_operations_agree(
    talk: Talk, seed: int, quotas: Quotas, targets: bool
) -> None:
    print(f"seed {seed}")
    conversation = talk(Random(seed), quotas, targets)
    while conversation.operations < 10_000:
        conversation.step()
    print(conversation.operations, "operations", conversation.events, "events", conversation.errors)
    assert conversation.events > 2000


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(random=st.randoms(use_true_random=False), small=st.booleans())
def test_short_conversations_agree(talk: Talk, random: Random, small: bool) -> None:
    conversation = talk(random, SMALL_QUOTAS if small else Quotas(), False)
    for _ in range(30):
        conversation.step()
