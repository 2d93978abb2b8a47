# SPDX-License-Identifier: Apache-2.0
"""A backend as a service: its file of settings, SIGHUP, and what it tells systemd."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from service_manager import Manager
from standstill import go_on, stand_still
from xvd_process import Daemon, run_xvd

from xvd.backend.settings import Settings

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).resolve().parents[2] / "contrib" / "xvd.toml"


# ---- xvd config --------------------------------------------------------------------------------


def test_a_file_in_order_is_said_to_be() -> None:
    result = run_xvd("config", "check", str(EXAMPLE))

    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"{EXAMPLE}: it is in order\n"


def test_a_mistake_is_a_line_and_a_status(tmp_path: Path) -> None:
    file = tmp_path / "xvd.toml"
    file.write_text("[settings]\nmax_queue = 1\n")

    result = run_xvd("config", "check", str(file))

    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        f"xvd: {file}:2: [settings]: there is no setting 'max_queue'; did you mean max_queues?\n"
    )


def test_a_file_that_is_not_there_is_a_mistake(tmp_path: Path) -> None:
    result = run_xvd("config", "check", str(tmp_path / "none"))

    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        f"xvd: {tmp_path / 'none'}: No such file or directory; name a file of settings\n"
    )


def test_the_settings_are_shown_with_where_they_are_from(tmp_path: Path) -> None:
    file = tmp_path / "xvd.toml"
    file.write_text('[settings]\nmax_queues = 3\n[disks."web/xvda"]\non_error = "hold"\n')

    lines = run_xvd("config", "show", str(file)).stdout.splitlines()
    rows = json.loads(run_xvd("config", "show", str(file), "--json").stdout)

    assert f"settings           max_queues                                3  {file}:2" in lines
    assert f'disks."web/xvda"   on_error                               hold  {file}:4' in lines
    assert "settings           poll_us                                   -  default" in lines
    assert len(lines) == len(rows) == 6 + 4 + len(Settings.table()) + 1
    assert {"table": "settings", "name": "max_queues", "value": 3, "origin": f"{file}:2"} in rows


# ---- xvd backend -------------------------------------------------------------------------------


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    found = Manager(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    yield found
    found.close()


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Path]:
    with Daemon("host", str(tmp_path / "host")):
        yield tmp_path / "host"


def settings_of(host: Path, *disk: str) -> dict[str, object]:
    told = run_xvd("set", "--json", *disk, "--host", str(host))
    return json.loads(told.stdout)["backend-0"]


def test_the_command_line_stands_before_the_file(host: Path, tmp_path: Path) -> None:
    file = tmp_path / "xvd.toml"
    file.write_text("[settings]\nmax_queues = 3\nmax_buffer_pages = 7\n")

    with Daemon("backend", "--host", str(host), "--config", str(file), "--set", "max_queues=2"):
        found = settings_of(host)

    assert (found["max_queues"], found["max_buffer_pages"]) == (2, 7)


def test_a_backend_does_not_begin_with_a_file_that_is_not_in_order(
    host: Path, tmp_path: Path
) -> None:
    file = tmp_path / "xvd.toml"
    file.write_text("[settings]\nmax_queues = -1\n")

    result = run_xvd("backend", "--host", str(host), "--config", str(file))

    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        f"xvd: {file}:2: [settings]: max_queues=-1: "
        "max_queues takes a whole number from 0 to 1024\n"
    )


def test_sighup_lets_a_change_hold_and_a_bad_file_changes_nothing(
    host: Path, tmp_path: Path, manager: Manager
) -> None:
    file = tmp_path / "xvd.toml"
    file.write_text("[settings]\nmax_buffer_pages = 7\n[groups.gold]\ntotal_iops_sec = 5\n")
    with Daemon("backend", "--host", str(host), "--config", str(file)) as backend:
        assert manager.hear("READY=1") == "READY=1\nSTATUS=serving vbd"

        file.write_text("[settings]\nmax_buffer_pages = 9\n[groups.gold]\ntotal_iops_sec = 6\n")
        backend.process.send_signal(signal.SIGHUP)
        assert "\nMONOTONIC_USEC=" in manager.hear("RELOADING=1")
        manager.hear("READY=1")
        groups = json.loads(run_xvd("group", "--json", "--host", str(host)).stdout)
        assert settings_of(host)["max_buffer_pages"] == 9
        assert groups["backend-0"]["gold"]["limits"] == {"total_iops_sec": 6}

        file.write_text("[settings]\nmax_buffer_pages = 11\nmax_queues = 'many'\n")
        backend.process.send_signal(signal.SIGHUP)
        manager.hear("READY=1")
        assert settings_of(host)["max_buffer_pages"] == 9

        assert backend.stop() == 0
        manager.hear("STOPPING=1")


def test_a_reload_says_what_holds_from_the_next_start_on(
    host: Path, tmp_path: Path, manager: Manager
) -> None:
    file, log = tmp_path / "xvd.toml", tmp_path / "log"
    file.write_text('[daemon]\nlog_level = "info"\n')
    with log.open("w") as stderr:
        options = ("--host", str(host), "--config", str(file))
        with Daemon("backend", *options, stderr=stderr) as backend:
            for more in ('layers = ["readonly"]\n', "[daemons]\n"):
                manager.hear("READY=1")
                file.write_text(f'[daemon]\nlog_level = "info"\n{more}')
                backend.process.send_signal(signal.SIGHUP)
            manager.hear("READY=1")
            assert backend.stop() == 0

    assert log.read_text().splitlines() == [
        "xvd: WARNING: layers: another value holds from the next start on",
        "xvd: INFO: the settings were read again",
        f"xvd: ERROR: all stays as it was: {file}:3: there is no table [daemons]; "
        "did you mean daemon?",
    ]


ON_A_TERMINAL = """
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "xvd.cli", *sys.argv[1:]])
"""


def test_a_backend_on_a_terminal_reloads_by_a_signal_and_ends_with_the_terminal(
    host: Path, tmp_path: Path, manager: Manager
) -> None:
    file = tmp_path / "xvd.toml"
    file.write_text("[settings]\nmax_buffer_pages = 7\n")
    ours, its = os.openpty()
    words = ("backend", "--host", str(host), "--config", str(file))
    backend = subprocess.Popen([sys.executable, "-c", ON_A_TERMINAL, *words], stdin=its)
    os.close(its)
    try:
        manager.hear("READY=1")
        file.write_text("[settings]\nmax_buffer_pages = 9\n")
        backend.send_signal(signal.SIGHUP)
        manager.hear("READY=1")
        assert settings_of(host)["max_buffer_pages"] == 9
    finally:
        os.close(ours)

    assert backend.wait(30) == 0


def test_the_watchdog_hears_of_the_event_loop(
    host: Path, manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "100000")
    with Daemon("backend", "--host", str(host)) as backend:
        for _ in range(3):
            manager.hear("WATCHDOG=1")

        stand_still(backend.process.pid)  # nothing is told of a loop that stands
        go_on(backend.process.pid)
        manager.hear("WATCHDOG=1")


def test_a_watchdog_of_another_process_is_not_ours(
    host: Path, manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "1000")
    monkeypatch.setenv("WATCHDOG_PID", "1")
    with Daemon("backend", "--host", str(host)) as backend:
        assert manager.hear("READY=1") == "READY=1\nSTATUS=serving vbd"

        assert backend.stop() == 0

        assert manager.hear("STOPPING=1") == "STOPPING=1"


def test_each_guests_process_is_told_of_a_change_and_so_are_later_ones(
    host: Path, tmp_path: Path, manager: Manager
) -> None:
    file = tmp_path / "xvd.toml"
    file.write_text('[daemon]\nisolation = "guest"\n')
    attach = ("attach", "--host", str(host))
    with Daemon("backend", "--host", str(host), "--config", str(file)) as backend:
        manager.hear("READY=1")
        assert run_xvd(*attach, "1", "vdev=xvda,target=null:1M").returncode == 0
        with file.open("a") as more:
            more.write("[settings]\nmax_buffer_pages = 9\n[disks.'2/xvda']\nmax_queues = 1\n")

        backend.process.send_signal(signal.SIGHUP)
        manager.hear("READY=1")
        assert run_xvd(*attach, "2", "vdev=xvda,target=null:1M").returncode == 0

        told = json.loads(run_xvd("set", "--json", "--host", str(host)).stdout)
        assert {name: values["max_buffer_pages"] for name, values in told.items()} == {
            "backend-0": 9, "backend-0-1": 9, "backend-0-2": 9,
        }  # fmt: skip
        assert backend.stop() == 0
