# SPDX-License-Identifier: Apache-2.0
"""A guest that wants to fill the log gets a few lines of each text, and a count of the rest."""

import ast
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from xvd.loglimit import BURST, PERIOD_S, LogLimit
from xvd.types import Domid
from xvd.xenbus.log import EVENTS, DeviceLog


class Now:
    """A clock that stands until it is moved."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def now() -> Now:
    return Now()


@pytest.fixture
def limit(now: Now) -> LogLimit:
    return LogLimit(Domid(7), now)


def log_of(disk: str, limit: LogLimit) -> DeviceLog:
    return DeviceLog(logging.getLogger("xvd.test"), disk, limit)


def test_a_text_is_logged_a_few_times_over_all_disks_and_then_counted(
    now: Now,
    limit: LogLimit,
    expect_log: Callable[[str], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    expect_log("has failed|domain 7: 96 more lines left out")
    logs = [log_of(f"7/xvd{letter}", limit) for letter in "abcde"]

    for _ in range(20):
        for log in logs:
            log.error("has failed: %s", "for some reason")
    now.seconds += PERIOD_S
    logs[0].error("has failed: %s", "again")

    lines = [record.getMessage() for record in caplog.records]
    assert lines[: BURST[logging.ERROR]] == [
        f"7/xvd{letter}: has failed: for some reason" for letter in "abcd"
    ]
    assert lines[BURST[logging.ERROR] :] == [
        "domain 7: 96 more lines left out, as 'has failed: %s'",
        "7/xvda: has failed: again",
    ]


def test_another_text_and_another_guest_are_heard(
    limit: LogLimit, expect_log: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    expect_log("one|another")
    for _ in range(100):
        log_of("7/xvda", limit).error("one")

    log_of("7/xvda", limit).error("another")
    log_of("8/xvda", LogLimit(Domid(8))).error("one")

    assert [r.getMessage() for r in caplog.records][-2:] == ["7/xvda: another", "8/xvda: one"]


def test_what_is_asked_for_to_find_a_mistake_has_no_limit(
    limit: LogLimit, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "xvd.test")

    for _ in range(500):
        log_of("7/xvda", limit).debug("a detail")

    assert len(caplog.records) == 500


PACKAGE = Path(__file__).resolve().parents[2] / "src" / "xvd"


def calls_of_logs() -> Iterator[tuple[str, ast.Call]]:
    """(where it is, a call) of each line that a disk logs, but those for a search of mistakes."""
    for folder in ("backend", "frontend", "xenbus"):
        for path in sorted((PACKAGE / folder).glob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                match node:
                    case ast.Call(
                        func=ast.Attribute(
                            value=ast.Attribute(attr="_log" | "log") | ast.Name(id="log"),
                            attr="info" | "warning" | "error",
                        )
                    ):
                        yield f"{folder}/{path.name}:{node.lineno}", node


def test_every_line_of_a_disk_has_an_event_of_the_table() -> None:
    events = {
        where: [keyword.value.value for keyword in call.keywords if keyword.arg == "event"
                and isinstance(keyword.value, ast.Constant)]
        for where, call in calls_of_logs()
    }  # fmt: skip

    assert len(events) > 30
    assert [where for where, found in events.items() if len(found) != 1] == []
    assert {event for found in events.values() for event in found} == EVENTS.keys()
