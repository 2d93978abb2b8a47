# SPDX-License-Identifier: Apache-2.0
"""``xvd top`` on a terminal, over real daemons: the full screen, and what there is without it."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest
from xvd_process import FourProcesses

pytestmark = pytest.mark.slow

XVD = (sys.executable, "-m", "xvd.cli")
WITHOUT_TEXTUAL = (
    sys.executable, "-c",
    "import sys; sys.modules['textual'] = None; from xvd.cli.__main__ import main; main()",
)  # fmt: skip
ALTERNATE, BACK = "\x1b[?1049h", "\x1b[?1049l"
"""What a terminal is sent for the screen of a full-screen program, and for the way back."""


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FourProcesses]:
    with FourProcesses(tmp_path_factory.mktemp("top"), "memory:16M") as processes:
        yield processes


class Terminal:
    """A program on a terminal of its own; `seen` is what it has sent there."""

    def __init__(self, *command: str) -> None:
        self._ours, its = pty.openpty()
        self.process = subprocess.Popen(
            command, stdin=its, stdout=its, stderr=its, start_new_session=True,
            env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "130", "LINES": "30"},
        )  # fmt: skip
        os.close(its)
        self.seen = ""

    def read_until(self, pattern: str) -> None:
        """Read until what was sent matches, or to the end."""
        while not re.search(pattern, self.seen):
            try:
                data = os.read(self._ours, 65536)
            except OSError:  # so Linux says that nobody has the other side any more
                data = b""
            if not data:
                return
            self.seen += data.decode(errors="replace")

    def press(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def end(self) -> int:
        """Read all that is left; the exit status."""
        self.read_until(r"\Z(?!)")
        return self.process.wait(60)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


def words(four: FourProcesses, *more: str) -> tuple[str, ...]:
    return ("top", "--host", str(four.directory), "--interval", "0.1", *more)


def test_the_screen_shows_the_disk_and_its_guest_until_q(four: FourProcesses) -> None:
    with Terminal(*XVD, *words(four)) as terminal:
        terminal.read_until(r"1/xvda.*guest-1.*connected")
        terminal.press("q")

        assert terminal.end() == 0
        assert ALTERNATE in terminal.seen
        assert BACK in terminal.seen


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_gives_the_terminal_back(four: FourProcesses, number: signal.Signals) -> None:
    with Terminal(*XVD, *words(four)) as terminal:
        terminal.read_until("1/xvda")
        terminal.process.send_signal(number)

        assert terminal.end() == 0
        assert BACK in terminal.seen


def test_ctrl_c_ends_the_screen(four: FourProcesses) -> None:
    with Terminal(*XVD, *words(four)) as terminal:
        terminal.read_until("1/xvda")
        terminal.press("\x03")

        assert terminal.end() == 0
        assert BACK in terminal.seen


def test_so_many_polls_and_no_more(four: FourProcesses) -> None:
    with Terminal(*XVD, *words(four, "--count", "2")) as terminal:
        assert terminal.end() == 0
        assert "1/xvda" in terminal.seen


def test_a_host_without_a_daemon_is_one_line_after_the_screen(tmp_path: Path) -> None:
    with Terminal(*XVD, "top", "--host", str(tmp_path)) as terminal:
        assert terminal.end() == 1
        last = terminal.seen.rpartition(BACK)[2]
        assert re.search(r"xvd: [^\n]+: no daemon answers; start one: xvd backend", last)
        assert "Traceback" not in terminal.seen


def test_without_textual_there_is_the_table_and_what_to_install(four: FourProcesses) -> None:
    with Terminal(*WITHOUT_TEXTUAL, *words(four, "--count", "1")) as terminal:
        assert terminal.end() == 0
        assert re.search(r"1/xvda +alive", terminal.seen)
        assert "Install xvd[top]" in terminal.seen


def test_json_has_a_document_a_line_with_disks_and_their_queues(four: FourProcesses) -> None:
    result = four.run("top", "--json", "--count", "2", "--interval", "0.05")

    assert (result.returncode, result.stderr) == (0, "")
    documents = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(documents) == 2
    for document in documents:
        assert document["seconds"] > 0
        [disk] = document["disks"]
        assert (disk["disk"], disk["state"]) == ("1/xvda", "alive")
        assert [queue["queue"] for queue in disk["queues"]] == list(range(len(disk["queues"])))
        assert disk["queues"]
        assert {"reads", "writes", "p99_us", "in_flight"} <= disk["queues"][0].keys()
