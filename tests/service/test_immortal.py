# SPDX-License-Identifier: Apache-2.0
"""What a process shares with those that it forks, though they use it."""

import subprocess
import sys

import pytest

FORK_AND_USE = """
import gc, os, sys
from xvd.service.immortal import make_immortal

def written():
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("Private_Dirty:"))

used = [(str(number), float(number)) for number in range(100_000)]
made = make_immortal() if sys.argv[1] == "immortal" else 0
gc.freeze()
if os.fork() == 0:
    before = written()
    for pair in used:
        text, number = pair
    print(made, written() - before)
    sys.stdout.flush()
    os._exit(0)
assert os.wait()[1] == 0
"""


def used_by_a_fork(kind: str) -> tuple[int, int]:
    """How many objects were made immortal, and KiB that a fork has for itself after using them."""
    done = subprocess.run(
        [sys.executable, "-c", FORK_AND_USE, kind], capture_output=True, text=True, check=True
    )
    made, written = map(int, done.stdout.split())
    return made, written


@pytest.mark.skipif(sys.version_info < (3, 12), reason="Python has such objects since 3.12")
def test_what_is_immortal_stays_shared() -> None:
    _, mortal = used_by_a_fork("mortal")

    made, immortal = used_by_a_fork("immortal")

    assert made > 300_000
    assert immortal < mortal / 10


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="Python has such objects since 3.12")
def test_before_there_are_such_objects_nothing_is_done() -> None:
    made, _ = used_by_a_fork("immortal")

    assert made == 0
