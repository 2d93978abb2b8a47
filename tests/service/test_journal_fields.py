# SPDX-License-Identifier: Apache-2.0
"""What a disk says reaches the journal with fields, by its native protocol."""

import logging
import os
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from xvd.loglimit import LogLimit
from xvd.service.journal import MESSAGE_MAX, JournalHandler, handler_of
from xvd.types import Domid
from xvd.xenbus.log import DeviceLog


class Journal:
    """A socket as journald's, and the lines that come."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.settimeout(5)

    def line(self) -> dict[str, str]:
        """The fields of the next line, as journald takes a datagram apart."""
        data, fields = self.socket.recv(1 << 17), {}
        while data:
            head, _, data = data.partition(b"\n")
            name, equals, value = head.partition(b"=")
            if not equals:
                (length,) = struct.unpack_from("<Q", data)
                value, data = data[8 : 8 + length], data[8 + length + 1 :]
            fields[name.decode()] = value.decode()
        return fields


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    found = Journal(tmp_path / "journal")
    yield found
    found.socket.close()


@pytest.fixture
def logger(journal: Journal) -> Iterator[logging.Logger]:
    found, handler = logging.getLogger("xvd.test.journal"), JournalHandler(str(journal.path))
    found.addHandler(handler)
    found.setLevel(logging.DEBUG)
    yield found
    found.removeHandler(handler)
    handler.close()


def test_a_line_of_a_disk_has_its_domain_its_device_and_its_event(
    journal: Journal, logger: logging.Logger
) -> None:
    log = DeviceLog(logger, "7/xvda", LogLimit(Domid(7)))

    log.info("connected (%s)", "x86_64-abi", event="connected")

    assert journal.line() == {
        "MESSAGE": "7/xvda: connected (x86_64-abi)", "PRIORITY": "6", "SYSLOG_IDENTIFIER": "xvd",
        "XVD_LOGGER": "xvd.test.journal", "XVD_DOMAIN": "7", "XVD_VDEV": "xvda",
        "XVD_EVENT": "connected",
    }  # fmt: skip


def test_a_line_of_no_disk_has_no_such_fields(journal: Journal, logger: logging.Logger) -> None:
    logger.debug("something")

    assert journal.line() == {
        "MESSAGE": "something", "PRIORITY": "7", "SYSLOG_IDENTIFIER": "xvd",
        "XVD_LOGGER": "xvd.test.journal",
    }  # fmt: skip


def test_lines_that_a_guest_may_not_cause_are_counted_under_its_number(
    journal: Journal, logger: logging.Logger, expect_log
) -> None:
    expect_log("held|left out")
    now = [0.0]
    log = DeviceLog(logger, "7/xvda", LogLimit(Domid(7), lambda: now[0]))
    for _ in range(6):
        log.error("held", event="held")
    now[0] += 60

    log.error("held", event="held")

    lines = [journal.line() for _ in range(5)]
    assert lines[4]["XVD_DOMAIN"] == "7"
    assert lines[4]["XVD_EVENT"] == "lines-left-out"


@pytest.mark.parametrize(
    ("level", "priority"),
    [(logging.CRITICAL, "2"), (logging.ERROR, "3"), (logging.WARNING, "4")],
)
def test_levels_are_syslogs(
    journal: Journal, logger: logging.Logger, expect_log, level: int, priority: str
) -> None:
    expect_log("x")
    logger.log(level, "x")

    assert journal.line()["PRIORITY"] == priority


def test_a_text_cannot_make_fields(journal: Journal, logger: logging.Logger, expect_log) -> None:
    expect_log("name")
    text = "its name is\nPRIORITY=0\nXVD_DOMAIN=0\n"

    logger.warning(text)

    assert journal.line() == {
        "MESSAGE": text, "PRIORITY": "4", "SYSLOG_IDENTIFIER": "xvd",
        "XVD_LOGGER": "xvd.test.journal",
    }  # fmt: skip


def test_a_long_text_is_cut(journal: Journal, logger: logging.Logger) -> None:
    logger.info("x" * (1 << 20))

    assert len(journal.line()["MESSAGE"]) == MESSAGE_MAX


def test_a_journal_that_hangs_keeps_nobody_waiting(
    journal: Journal, logger: logging.Logger
) -> None:
    for _ in range(2000):
        logger.info("x")

    assert journal.line()["MESSAGE"] == "x"


def test_without_a_journal_the_line_is_on_stderr(
    logger: logging.Logger, journal: Journal, capsys: pytest.CaptureFixture[str]
) -> None:
    journal.path.unlink()

    logger.info("something")

    assert capsys.readouterr().err == "<6>xvd: something\n"


def test_only_a_stream_to_the_journal_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "stream").open("w") as stream, (tmp_path / "other").open("w") as other:
        found = os.fstat(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino}")

        handler = handler_of(stream)

        assert isinstance(handler, JournalHandler)
        handler.close()
        assert handler_of(other) is None
    monkeypatch.delenv("JOURNAL_STREAM")
    assert handler_of(sys.__stderr__ or sys.stderr) is None
