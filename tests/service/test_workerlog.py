# SPDX-License-Identifier: Apache-2.0
"""The way of a worker's lines to the daemon's log."""

import json
import logging
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
from rig_disk import run, until

from xvd.loglimit import LogLimit
from xvd.service import workerlog
from xvd.service.workerlog import BURST, RATE, TEXT_MAX, Allowance, PipeHandler, WorkerLog
from xvd.types import Domid
from xvd.xenbus.log import DeviceLog

Fields = tuple[str, str, str, str]


class Log(logging.Handler):
    """What reaches the daemon's log."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int, str, str, Fields]] = []

    def emit(self, record: logging.LogRecord) -> None:
        domain, vdev, event = (
            getattr(record, f"xvd_{name}", "") for name in ("domain", "vdev", "event")
        )
        about = ("xvd", domain, vdev, event)
        self.lines.append((record.levelno, record.name, record.getMessage(), about))

    @property
    def texts(self) -> list[str]:
        return [text for _, _, text, _ in self.lines]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[Log]:
    """In the place of the handlers that look for warnings: here they are what is wanted."""
    found, root = Log(), logging.getLogger()
    level = root.level
    monkeypatch.setattr(root, "handlers", [found])
    root.setLevel(logging.INFO)
    yield found
    root.setLevel(level)


@asynccontextmanager
async def pipe(*domains: int, allowance: Allowance | None = None) -> AsyncIterator[int]:
    """The end that a worker of these domains has; what it wrote is logged at the end of this."""
    ours = WorkerLog(domains, allowance or Allowance())
    yield ours.its
    os.close(ours.its)
    ours.close()


def said(*words: object) -> bytes:
    return b"\x1e" + json.dumps(words).encode() + b"\n"


def written(*lines: bytes, domains: tuple[int, ...] = (7,)) -> None:
    """Let a worker write these."""

    async def work() -> None:
        async with pipe(*domains) as its:
            for line in lines:
                os.write(its, line)

    run(work())


def test_a_disks_line_has_its_level_its_logger_and_its_fields(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("xvd.test.worker")
    logger.propagate = False
    handler = PipeHandler()
    logger.addHandler(handler)
    plain = os.write

    async def work() -> None:
        async with pipe(7) as its:
            monkeypatch.setattr(os, "write", lambda _, data: plain(its, data))
            disk = DeviceLog(logger, "7/xvda", LogLimit(Domid(7)))
            disk.warning("its storage failed: %s", "why", event="storage-error")

    run(work())
    logger.removeHandler(handler)
    assert log.lines == [
        (logging.WARNING, "xvd.test.worker", "7/xvda: its storage failed: why",
         ("xvd", "7", "xvda", "storage-error")),
    ]  # fmt: skip


def test_what_no_logger_said_is_an_error_of_the_guests_process(log: Log) -> None:
    written(b"Traceback:\nMemoryError\n", b"no end")

    texts = ["domain 7: Traceback:", "domain 7: MemoryError", "domain 7: no end"]
    assert log.lines == [
        (logging.ERROR, "xvd.worker", text, ("xvd", "7", "", "")) for text in texts
    ]


@pytest.mark.parametrize(
    ("line", "logged"),
    [
        (said(40, "xvd.a", "8/xvda: hello", "8", "xvda", "held"),
         (40, "xvd.a", "domain 7: 8/xvda: hello", ("xvd", "7", "", "held"))),
        (said(10**6, "os.x", "7/xvda: a", "7", "xvda", "A B"),
         (50, "xvd.worker", "7/xvda: a", ("xvd", "7", "xvda", ""))),
        (said(30, "xvd.a", "7/xvda: a\nxvd: ERROR: 8/xvda: b\x1b[2J", "7", "x=\n", ""),
         (30, "xvd.a", "7/xvda: a\n    xvd: ERROR: 8/xvda: b?[2J", ("xvd", "7", "", ""))),
        (b"\x1e[1, 2]\n", (40, "xvd.worker", "domain 7: [1, 2]", ("xvd", "7", "", ""))),
        (b"\xff\x00\n", (40, "xvd.worker", "domain 7: \ufffd?", ("xvd", "7", "", ""))),
    ],
    ids=["another guest", "a level and names", "more lines", "no line of ours", "bytes"],
)  # fmt: skip
def test_nothing_that_it_says_of_itself_is_believed(
    log: Log, line: bytes, logged: tuple[int, str, str, Fields]
) -> None:
    written(line)

    assert log.lines == [logged]


def test_a_guest_of_two_domains_speaks_for_both(log: Log) -> None:
    written(said(30, "xvd.a", "8/xvda: a", "8", "xvda", ""), domains=(7, 8))

    assert log.lines[0][3] == ("xvd", "8", "xvda", "")


def test_a_line_whose_end_found_no_room_costs_no_other(log: Log) -> None:
    whole = said(30, "xvd.a", "7/xvda: whole", "7", "xvda", "")
    written(said(30, "xvd.a", "7/xvda: cut", "7", "xvda", "")[:20], whole)

    assert log.texts[1:] == ["7/xvda: whole"]
    assert len(log.texts) == 2


def test_a_line_that_does_not_end_is_cut(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workerlog, "_LINE_MAX", 100)

    written(b"x" * 60_000)

    assert log.texts == [f"domain 7: {'x' * TEXT_MAX}"]


def test_what_is_not_logged_at_this_level_is_not(log: Log) -> None:
    written(said(10, "xvd.a", "7/xvda: a", "7", "xvda", ""))

    assert log.lines == []


def test_what_is_too_much_is_counted_and_told_once(log: Log) -> None:
    now = [0.0]

    async def work() -> None:
        async with pipe(7, allowance=Allowance(lambda: now[0])) as its:
            os.write(its, b"x\n" * (BURST + 300))
            await until(lambda: len(log.lines) == BURST)
            now[0] += 5 / RATE
            os.write(its, b"y\n" * 10)

    run(work())
    assert log.texts[BURST:-1] == ["domain 7: y"] * 5
    assert log.texts[-1] == "domain 7: 305 more lines of its process left out"
    assert log.lines[-1][3] == ("xvd", "7", "", "lines-left-out")


def test_a_guests_next_worker_has_what_the_last_one_left(log: Log) -> None:
    allowance = Allowance(lambda: 0.0)

    async def work() -> None:
        for _ in range(2):
            async with pipe(7, allowance=allowance) as its:
                os.write(its, b"x\n" * (BURST - 1))

    run(work())
    assert log.texts.count("domain 7: x") == BURST


def test_one_that_says_too_much_is_read_more_rarely(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pipe is full then, so it waits, and nobody else does."""
    monkeypatch.setattr(workerlog, "_PAUSE_S", 3600.0)

    async def work() -> None:
        async with pipe(7, allowance=Allowance(lambda: 0.0)) as its:
            os.write(its, b"x\n" * (BURST + 1))
            await until(lambda: len(log.lines) == BURST)
            assert os.write(its, b"x" * (1 << 20)) < 1 << 20
            with pytest.raises(BlockingIOError):
                os.write(its, b"x")

    run(work())


def test_a_search_of_mistakes_may_take_more_lines(log: Log) -> None:
    logging.getLogger().setLevel(logging.DEBUG)

    written(b"x\n" * (BURST + 300))

    assert log.texts.count("domain 7: x") == BURST + 300
