# SPDX-License-Identifier: Apache-2.0
"""What the tests on real Xen use: the daemon as a process, disks by xl, figures of the process."""

import enum
import os
import signal
import subprocess
import time
from pathlib import Path


def sh(command: str) -> str:
    """Run a shell command that must succeed; what it says."""
    done = subprocess.run(
        command, shell=True, check=False, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


class Slot(enum.Enum):
    """The words of xl's disk line that make a disk ours."""

    VBD = "script=block-xvd"
    TAP = "backendtype=tap,script=block-xvd"


class Backend:
    """``xvd backend``, restarted at will."""

    def __init__(self, directory: Path) -> None:
        self._log = directory / "log"
        self._out = directory / "out"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self, *options: str) -> None:
        with self._log.open("ab") as log, self._out.open("wb") as out:
            command = ["xvd", "backend", "-vv", *options]
            self._process = subprocess.Popen(command, stdout=out, stderr=log)
        end = time.monotonic() + 60
        while self._out.read_bytes() != b"ready\n":
            assert self._process.poll() is None, self.log()
            assert time.monotonic() < end, self.log()
            time.sleep(0.05)

    def stop(self) -> int:
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(60)

    def kill(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(60)

    def log(self) -> str:
        return self._log.read_text()

    def held(self) -> dict[str, int]:
        """What the process holds that could leak: descriptors, threads, mapped grants."""
        maps = Path(f"/proc/{self.pid}/maps").read_text()
        return {
            "descriptors": len(os.listdir(f"/proc/{self.pid}/fd")),
            "threads": len(os.listdir(f"/proc/{self.pid}/task")),
            "grant mappings": maps.count("/dev/xen/gntdev"),
        }


class Disk:
    """A disk that xl attaches to dom0 itself: the shortest way from a kernel to our backend."""

    device = Path("/dev/xvda")

    def __init__(self, image: Path, slot: Slot, access: str = "rw") -> None:
        self.image = image
        self.line = f"format=raw,vdev=xvda,access={access},{slot.value},target={image}"

    def attach(self) -> None:
        sh(f"xl block-attach 0 '{self.line}'")
        end = time.monotonic() + 30
        while not self.device.is_block_device():
            assert time.monotonic() < end, sh("xenstore-ls -f /local/domain/0")
            time.sleep(0.05)

    def detach(self) -> None:
        sh("xl block-detach 0 xvda")
        left = sh("xenstore-ls -f /local/domain/0 | grep -E '/(backend|device|error)/' || true")
        assert left == "", left
