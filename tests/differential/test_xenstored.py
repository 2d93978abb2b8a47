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
from xvd.machine.xs.messages import MessageType

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
def shim(requires_tool: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    requires_tool("/usr/include/xengnttab.h")
    return build_shim(requires_tool("gcc"), tmp_path_factory.mktemp("shim"))


@pytest.fixture
def talk(shim: Path, requires_tool: Callable[[str], str], tmp_path: Path) -> Iterator[Talk]:
    """Start both stores and a conversation with them; all ends with the test."""
    xenstored = requires_tool("/usr/lib/xen-*/bin/xenstored")
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


def test_the_parts_of_a_large_directory_agree(talk: Talk) -> None:
    conversation = talk(Random(0), Quotas(), False)
    for index in range(500):
        conversation.ask("dom0a", MessageType.MKDIR, f"/d/{'n' * (index % 20)}{index}\0".encode())
    whole = conversation.ask("dom0a", MessageType.DIRECTORY, b"/d\0")
    sizes = []
    for offset in (0, 1, 7, 3000, 4079, 4080, 4081, 4085, 4090, 4095, 4096, 4100, 9000, 2**31):
        payload = f"/d\0{offset}\0".encode()
        reply = conversation.ask("dom0a", MessageType.DIRECTORY_PART, payload)
        sizes.append(len(reply.payload))
    assert whole.payload == b"E2BIG\0"
    assert max(sizes) <= 4096


def test_values_at_the_limits_of_a_node_and_a_message_agree(talk: Talk) -> None:
    conversation = talk(Random(0), Quotas(), False)
    for name, path in (("guest1", "limit"), ("dom0a", "/limit")):
        for size in (0, 1, 2010, 2014, 2015, 2016, 2017, 2048, 4085, 4089):
            conversation.ask(name, MessageType.WRITE, f"{path}\0".encode() + bytes(size))
            conversation.ask(name, MessageType.READ, f"{path}\0".encode())
    assert conversation.errors == {"ENOSPC": 5}
