# SPDX-License-Identifier: Apache-2.0
"""``xvd exporter`` over real daemons, living, dead and hung."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from standstill import stand_still
from xvd_process import Daemon, FourProcesses, run_xvd

pytestmark = pytest.mark.slow

DISK = 'domain="1",name="guest-1",vdev="xvda"'


@pytest.fixture
def four(tmp_path: Path) -> Iterator[FourProcesses]:
    with FourProcesses(tmp_path, "memory:16M") as processes:
        yield processes


@pytest.fixture
def exporter(four: FourProcesses) -> Iterator[Daemon]:
    with Daemon("exporter", "--listen", "0", "--host", str(four.directory)) as daemon:
        yield daemon


def scrape(exporter: Daemon) -> str:
    with urllib.request.urlopen(exporter.line, timeout=60) as answer:
        return str(answer.read(), "utf-8")


def test_figures_are_what_was_done(four: FourProcesses, exporter: Daemon, requires_tool) -> None:
    assert f"xvd_disk_read_bytes_total{{{DISK}}} 0.0\n" in scrape(exporter)
    subprocess.run(
        [requires_tool("qemu-io"), "-f", "raw", "-c", "write 0 1M", "-c", "read 0 2M", four.uri],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip

    text = scrape(exporter)

    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/metrics", exporter.line)
    assert f"xvd_disk_read_bytes_total{{{DISK}}} 2.097152e+06\n" in text
    assert 'xvd_up{daemon="backend-0"} 1.0\n' in text
    assert 'xvd_up{daemon="nbd-1-51712"} 1.0\n' in text
    assert 'xvd_exporter_errors_total{what="names"} 0.0\n' in text
    assert exporter.stop() == 0


def test_prometheus_finds_nothing_to_mend(exporter: Daemon, requires_tool) -> None:
    text = scrape(exporter)

    done = subprocess.run(
        [requires_tool("promtool"), "check", "metrics"],
        input=text, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_daemon_that_hangs_or_is_dead_is_down_and_no_error(
    four: FourProcesses, exporter: Daemon
) -> None:
    four.nbd.kill()
    stand_still(four.backend.process.pid)

    text = scrape(exporter)

    assert 'xvd_up{daemon="backend-0"} 0.0\n' in text
    assert 'xvd_up{daemon="nbd-1-51712"} 0.0\n' in text
    assert "xvd_disk_read_bytes_total{" not in text


def test_a_host_that_is_not_there_has_no_daemons(tmp_path: Path) -> None:
    with Daemon("exporter", "--listen", "0", "--host", str(tmp_path / "none")) as exporter:
        text = scrape(exporter)

    assert "xvd_daemons 0.0\n" in text


def test_what_is_no_socket_is_no_daemon(four: FourProcesses, exporter: Daemon) -> None:
    (four.directory / "figures" / ".backend-1.new").mkdir()

    assert "xvd_daemons 2.0\n" in scrape(exporter)


def test_a_unix_socket_is_removed_at_the_end(four: FourProcesses, tmp_path: Path) -> None:
    path = tmp_path / "exporter.sock"
    with Daemon("exporter", "--listen", f"unix:{path}", "--host", str(four.directory)) as exporter:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            connection = http.client.HTTPConnection("localhost")
            connection.sock = client
            connection.request("GET", "/metrics")

            assert b'xvd_up{daemon="backend-0"} 1.0\n' in connection.getresponse().read()
        assert exporter.line == f"unix:{path}"
        assert exporter.stop() == 0

    assert not path.exists()


def test_a_file_for_node_exporter(four: FourProcesses, tmp_path: Path) -> None:
    path = tmp_path / "xvd.prom"

    result = four.run("exporter", "--textfile", str(path))

    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert 'xvd_up{daemon="backend-0"} 1.0\n' in path.read_text()


def test_a_host_that_cannot_be_listed_is_asked_all_the_same(
    four: FourProcesses, tmp_path: Path, requires_tool
) -> None:
    """Of /run/xvd the exporter's unit may use what lies in it, and no more."""
    four.directory.chmod(0o311)
    powerless = (requires_tool("setpriv"), "--bounding-set=-all") if os.geteuid() == 0 else ()
    path = tmp_path / "xvd.prom"

    done = subprocess.run(
        [*powerless, sys.executable, "-m", "xvd.cli", "exporter", "--textfile", str(path),
         "--host", str(four.directory)],
        check=False, capture_output=True, text=True,
    )  # fmt: skip

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert 'xvd_up{daemon="backend-0"} 1.0\n' in path.read_text()


def test_a_file_that_cannot_be_written_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    path = tmp_path / "none" / "xvd.prom"

    result = run_xvd("exporter", "--textfile", str(path), "--host", str(tmp_path))

    assert (result.returncode, result.stdout) == (1, "")
    assert re.fullmatch(r"xvd: [^\n]+none/xvd\.prom[^\n]+\n", result.stderr), result.stderr
    assert os.listdir(tmp_path) == ["figures"]


def test_a_file_is_written_again_and_again(four: FourProcesses, tmp_path: Path) -> None:
    path = tmp_path / "xvd.prom"
    process = subprocess.Popen(
        [sys.executable, "-m", "xvd.cli", "exporter", "--textfile", str(path), "--interval", "0.05",
         "--host", str(four.directory)],
    )  # fmt: skip
    try:
        for _ in range(2):  # it is there, and it comes again
            while not path.exists():
                assert process.poll() is None
            path.unlink()
        process.send_signal(signal.SIGTERM)

        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def test_who_may_read_figures_changes_nothing(four: FourProcesses) -> None:
    answers = {}
    for method in ("rpc_get_methods", "set", "stats"):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(four.directory / "figures" / "backend-0"))
            client.sendall(b'{"jsonrpc":"2.0","id":1,"method":"%s"}\n' % method.encode())
            answers[method] = json.loads(client.makefile().readline())

    assert answers["stats"]["result"][0]["disk"] == "1/xvda"
    assert answers["set"]["error"]["message"] == "no method 'set'"
    assert answers["rpc_get_methods"]["error"]["code"] == -32601


@pytest.mark.parametrize(
    ("made", "text"),
    [
        ((), "{host}: there is no such directory; name the host's: --host DIR"),
        (("control",), "{host}: no daemon has ever been there, as {host}/figures is missing; name "
         "the host's directory (--host DIR), or start a backend first"),
    ],
    ids=["not there", "no host"],
)  # fmt: skip
def test_a_file_of_what_is_no_host_is_not_written(
    tmp_path: Path, made: tuple[str, ...], text: str
) -> None:
    host, path = tmp_path / "host", tmp_path / "xvd.prom"
    for name in made:
        (host / name).mkdir(parents=True)

    result = run_xvd("exporter", "--textfile", str(path), "--host", str(host))

    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"xvd: {text.format(host=host)}\n"
    assert not path.exists()
