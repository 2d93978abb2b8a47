# SPDX-License-Identifier: Apache-2.0
"""For how long a thread looks before it sleeps, by a clock that the test moves."""

import subprocess
import sys

import pytest

from xvd.dataplane.loop.waiting import Waiting

US, MS, S = 1000, 1_000_000, 1_000_000_000
HOP, HOP_CPU = 20 * US, 4 * US


def looks(waiting: Waiting, begun: int, every: int = US) -> int:
    """Look until told to sleep; for how long that was."""
    now = begun
    while waiting.look_on(now):
        now += every
    return now - begun


def test_a_look_is_as_long_as_a_sleep_costs() -> None:
    waiting = Waiting(HOP, HOP_CPU)

    assert looks(waiting, S) == HOP


def test_where_sleeps_cost_more_looks_are_longer() -> None:
    waiting = Waiting(HOP, HOP_CPU)
    for turn in range(1, 50):
        waiting.look_on(turn * S)
        waiting.wakes(turn * S + US, cpu_ns=3 * HOP_CPU)

    assert waiting.longest_ns == pytest.approx(3 * HOP, rel=0.01)
    assert looks(waiting, 60 * S) == pytest.approx(3 * HOP, rel=0.05)


def test_a_cpu_that_is_taken_away_within_sleeps_does_not_make_looks_long() -> None:
    waiting = Waiting(HOP, HOP_CPU)
    for turn in range(1, 50):
        waiting.look_on(turn * S)
        waiting.wakes(turn * S + US, cpu_ns=20 * MS if turn % 2 else HOP_CPU)

    assert waiting.longest_ns <= 4 * HOP


def test_where_sleeps_seem_to_cost_nothing_a_look_is_still_that_of_two_threads() -> None:
    waiting = Waiting(HOP, HOP_CPU)
    for turn in range(1, 50):
        waiting.look_on(turn * S)
        waiting.wakes(turn * S + US, cpu_ns=1)

    assert waiting.longest_ns == HOP


def test_an_idle_disk_soon_looks_no_more() -> None:
    waiting = Waiting(HOP, HOP_CPU)
    found = []
    for turn in range(1, 6):
        found.append(looks(waiting, turn * S))
        waiting.wakes(turn * S + S // 2)

    assert found == [20 * US, 10 * US, 5 * US, 3 * US, 0]


def test_a_sleep_that_a_look_would_have_spared_makes_looks_longer() -> None:
    waiting = Waiting(HOP, HOP_CPU)
    for turn in range(1, 6):
        looks(waiting, turn * S)
        waiting.wakes(turn * S + S // 2)
    found = []
    for turn in range(6, 11):
        waiting.look_on(turn * S)
        waiting.wakes(turn * S + 2 * HOP + HOP // 2)  # the other end had slept too
        found.append(waiting.look_ns)

    assert found == [4 * US, 8 * US, 16 * US, 20 * US, 20 * US]


def test_looks_that_find_nothing_in_time_become_few() -> None:
    # As of a disk that takes somewhat longer than a sleep costs, whatever anybody does.
    waiting = Waiting(HOP, HOP_CPU)
    found = []
    for turn in range(1, 401):
        found.append(looks(waiting, turn * S))
        waiting.wakes(turn * S + 3 * HOP)

    assert found[:8] == [HOP] * 8
    assert sum(found[200:]) < 200 * HOP / 5


def test_looks_that_find_something_go_on() -> None:
    waiting = Waiting(HOP, HOP_CPU)
    for turn in range(1, 401):
        waiting.look_on(turn * S)
        if turn % 2:
            waiting.has_work()
        else:
            waiting.wakes(turn * S + 3 * HOP)

    assert waiting.look_ns == HOP


def interrupted(waiting: Waiting, now: int, gap: int) -> bool:
    """Whether there was a look, which was interrupted for so long."""
    looked = waiting.look_on(now)
    if looked:
        waiting.look_on(now + gap)
    waiting.has_work()
    return looked


def test_what_a_host_takes_now_and_then_keeps_nobody_from_looking() -> None:
    waiting = Waiting(HOP, HOP_CPU)

    assert all(interrupted(waiting, S + turn * 20 * MS, MS) for turn in range(1000))


def test_a_thread_whose_cpu_is_needed_by_others_looks_no_more_than_it_owes_them() -> None:
    waiting = Waiting(HOP, HOP_CPU)
    found = [interrupted(waiting, S + turn * 4 * MS, 3 * MS) for turn in range(2500)]

    # 100 ms of what is owed are noise; each gap costs a pause of 16 times 3 ms, for ten seconds.
    assert sum(found) == (100 + 10_000) // 48 + 1


def test_a_gap_is_counted_once() -> None:
    waiting = Waiting(HOP, HOP_CPU)
    waiting.look_on(S)
    for _ in range(5):
        assert not waiting.look_on(S + 4 * MS)  # the look is over; what is owed, 64 ms, is noise
    waiting.has_work()

    assert waiting.look_on(S + 4 * MS)


def test_a_pause_is_a_second_at_most() -> None:
    waiting = Waiting(HOP, HOP_CPU)
    interrupted(waiting, S, 60 * S)  # a host that was suspended

    assert not interrupted(waiting, 62 * S - MS, 0)
    assert interrupted(waiting, 62 * S, 0)


def test_what_was_set_by_hand_is_done_whatever_it_costs_others() -> None:
    waiting = Waiting(HOP, HOP_CPU, set_ns=10 * MS)
    waiting.look_on(S)

    assert waiting.look_on(S + 9 * MS)
    assert not waiting.look_on(S + 10 * MS)


def test_polling_that_was_switched_off_stays_off() -> None:
    waiting = Waiting(HOP, HOP_CPU, set_ns=0)
    waiting.wakes(S, cpu_ns=HOP_CPU)

    assert not waiting.look_on(S)


DISTURBED = """
import signal, threading
from xvd.dataplane.loop.waiting import sleep_cost_s
signal.signal(signal.SIGUSR1, lambda *_: None)
main, over, begun = threading.get_ident(), threading.Event(), threading.Event()

def disturb():
    while not over.is_set():
        signal.pthread_kill(main, signal.SIGUSR1)
        begun.set()

threading.Thread(target=disturb, daemon=True).start()
begun.wait()
print(sleep_cost_s() > 0)
over.set()
"""


def test_signals_do_not_disturb_the_measurement() -> None:
    # A word that a signal was taken for left both threads waiting for each other for ever.
    result = subprocess.run(
        [sys.executable, "-c", DISTURBED], check=False, capture_output=True, text=True, timeout=60
    )

    assert (result.returncode, result.stdout) == (0, "True\n"), result.stderr
