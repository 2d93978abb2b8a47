# SPDX-License-Identifier: Apache-2.0
"""What a guest's worker can reach, when it is its guest's: tried from within one."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from xvd.service.workerlog import BURST

pytestmark = pytest.mark.slow

PROBE = Path(__file__).resolve().parents[1] / "support/sandbox_probe.py"

REACHED = {
    "use its own image",
    "use its own state directory",
    "use what an administrator's call names",
    "say more than a guest may",  # and most of it is in no log: see below
    "read what everybody may of the system",
    "have a ring",
    "read its guest's disk",
    "write its disk's state",
    "read its guest's frontend",
    "reach its guest's grants",
    "have to do with more domains",  # which changes nothing: see what comes after it
}
"""All that there is for it."""

DENIED = {
    "EBADF": {
        "say something on a socket of its supervisor's", "have its supervisor's output",
    },
    "EACCES": {
        "write to its read-only image", "write to it by its descriptor", "cut its own image",
        "use it when the call is over",
        "read another guest's image", "read it behind dots", "use another guest's state directory",
        "read a secret of the host", "read a file of the host", "read it by io_uring",
        "list a directory of the host", "make a file", "read its supervisor's memory",
        "read its own memory as a file", "have one by io_uring",
        # By the store:
        "name another image", "name it by an absolute path", "be allowed to write",
        "let others write its nodes", "make a disk", "write to its guest's frontend",
        "read another guest's disk", "watch another guest's disk", "read another guest's nodes",
        "list the guests", "write a node of the host", "remove another guest's disk", "end a guest",
        "control the store",
    },
    "EPERM": {
        "make a directory", "make a link", "have a socket of the network",
        "have a socket of the host", "say something on a socket of its own",
        "have a netlink socket", "start a process", "start a program",
        "signal its supervisor", "signal it by a descriptor", "trace its supervisor",
        "read its memory by a call", "become root", "change its root", "mount something",
        "have a namespace", "load a program into the kernel", "use the kernel's keys",
        "count events of the CPU", "handle its own page faults", "type into a terminal",
        "raise its limits",
    },
    "EINVAL": {"have a ring that a thread of the kernel polls"},
    "ConfigError": {  # by the machine
        "reach another guest's grants", "bind to another guest's event channel",
        "have a channel for another guest", "share pages with another guest", "end another guest",
        "have a store connection of its own", "and then reach them",
    },
}  # fmt: skip
"""By what comes of it."""

Outcomes = dict[str, str]


class Tried(NamedTuple):
    """What came of each attempt in a confined worker, and in a process that is not; and what is in
    the log then, each line with the domain that it is about."""

    confined: Outcomes
    free: Outcomes
    log: list[tuple[str, str]]


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> Tried:
    place = tmp_path_factory.mktemp("probe")
    done = subprocess.run(
        [sys.executable, str(PROBE), str(place)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return Tried(*map(json.loads, done.stdout.splitlines()))


def test_it_reaches_its_guests_disks_and_nothing_else(tried: Tried) -> None:
    outcomes = tried.confined

    assert {name for name, outcome in outcomes.items() if outcome == "done"} == REACHED


@pytest.mark.parametrize(
    ("attempt", "outcome"), [(name, how) for how, names in DENIED.items() for name in sorted(names)]
)
def test_it_cannot(tried: Tried, attempt: str, outcome: str) -> None:
    outcomes = tried.confined

    assert outcomes[attempt] == outcome


def test_every_attempt_is_looked_at(tried: Tried) -> None:
    outcomes = tried.confined

    assert outcomes.keys() == REACHED.union(*DENIED.values())


def test_without_the_fence_the_same_attempts_succeed(tried: Tried) -> None:
    assert set(tried.free.values()) == {"done"}


def test_what_it_says_is_limited_counted_and_under_its_guests_number(tried: Tried) -> None:
    flood = [(text, domain) for text, domain in tried.log if "FLOOD" in text]
    told = [int(found[1]) for text, _ in tried.log if (found := re.match(LEFT_OUT, text))]

    assert BURST <= len(flood) < 5000
    assert len(flood) + sum(told) == 10_000
    assert set(flood) == {("domain 1: FLOOD", "1"), ("domain 1: 2/xvda: FLOOD", "1")}


LEFT_OUT = r"domain 1: (\d+) more lines of its process left out"
