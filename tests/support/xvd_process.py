# SPDX-License-Identifier: Apache-2.0
"""The command line as a user has it: real processes."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self, cast

TIMEOUT_S = 110
"""Short of the limit of a test: a measurement may have to fetch its peer first."""


def run_xvd(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a verb to its end."""
    return subprocess.run(
        [sys.executable, "-m", "xvd.cli", *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "200", **variables},
    )


UNIT = Path(__file__).resolve().parents[2] / "contrib/xvd-backend.service"


def as_by_the_unit() -> list[str]:
    """The command that starts a backend with the powers that its unit leaves to root's."""
    if os.geteuid() != 0:
        return []
    [line] = [it for it in UNIT.read_text().splitlines() if it.startswith("CapabilityBoundingSet=")]
    powers = [it.removeprefix("CAP_").lower() for it in line.partition("=")[2].split()]
    left = ",".join(["-all", *(f"+{power}" for power in powers)])
    return ["setpriv", "--no-new-privs", "--bounding-set", left]


class Daemon:
    """A verb that runs until it is told to end; ready once it has printed its first line."""

    def __init__(
        self,
        *arguments: str,
        stderr: int | IO[str] = subprocess.DEVNULL,
        by: Sequence[str] = (),
        program: Sequence[str] = ("-m", "xvd.cli"),
    ) -> None:
        """by: a command that starts it. program: what Python runs."""
        self.process = subprocess.Popen(
            [*by, sys.executable, *program, *arguments],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        self._output = cast("IO[str]", self.process.stdout)
        self.line = self._output.readline().strip()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
        self._reap()

    def stop(self) -> int:
        """SIGTERM; its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self._reap()

    def wait(self) -> int:
        """Wait for it to end; its exit status."""
        return self.process.wait(TIMEOUT_S)

    def _reap(self) -> int:
        self._output.close()
        return self.process.wait(TIMEOUT_S)


class FourProcesses:
    """host + backend + attach + nbd, in a directory of their own."""

    def __init__(self, directory: Path, image: Path | str, *backend_options: str) -> None:
        self.directory = directory / "host"
        self.socket = directory / "nbd.sock"
        self.uri = f"nbd+unix:///?socket={self.socket}"
        self._options = ("--host", str(self.directory), *backend_options)
        self.host = Daemon("host", str(self.directory))
        self.start_backend()
        attached = self.run("attach", "1", f"vdev=xvda,target={image}")
        assert attached.returncode == 0, attached.stderr
        self.start_nbd()

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A verb on this host."""
        return run_xvd(*arguments, "--host", str(self.directory))

    def start_backend(self) -> Daemon:
        """Another backend."""
        self.backend = Daemon("backend", *self._options)
        return self.backend

    def start_nbd(self) -> Daemon:
        """Another frontend."""
        self.nbd = Daemon(
            "nbd", "1", "xvda", "--host", str(self.directory), "--socket", str(self.socket)
        )
        return self.nbd

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for daemon in (self.nbd, self.backend, self.host):
            daemon.__exit__(None, None, None)
