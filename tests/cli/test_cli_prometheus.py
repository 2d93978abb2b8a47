# SPDX-License-Identifier: Apache-2.0
"""A Prometheus server scrapes the exporter of a host under load."""

import json
import re
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
from monitoring import RULES, alert_queries, dashboard_queries
from xvd_process import Daemon, FourProcesses

pytestmark = [pytest.mark.slow, pytest.mark.tools]

CONFIGURATION = """\
global: {{scrape_interval: 500ms, evaluation_interval: 500ms}}
rule_files: ["{rules}"]
scrape_configs:
  - job_name: xvd
    static_configs: [{{targets: ["{target}"]}}]
"""


class Prometheus:
    """A server on a free port of loopback that keeps its data in `directory`."""

    def __init__(self, program: str, directory: Path, target: str) -> None:
        configuration = directory / "prometheus.yml"
        configuration.write_text(CONFIGURATION.format(rules=RULES, target=target))
        self._process = subprocess.Popen(
            [program, f"--config.file={configuration}", f"--storage.tsdb.path={directory}/data",
             "--web.listen-address=127.0.0.1:0"],
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._process.stderr is not None
        self._log = self._process.stderr
        self.address = ""
        for line in self._log:
            if listening := re.search(r'"Listening on" address=(\S+)', line):
                self.address = listening[1]
            if "ready to receive web requests" in line:
                return
        raise AssertionError("prometheus has ended")

    def ask(self, path: str, **parameters: str) -> Any:
        """Call its API; the call succeeds."""
        url = f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=60) as answer:
            found = json.load(answer)
        assert found["status"] == "success"
        return found["data"]

    def query(self, expr: str) -> list[tuple[dict[str, str], float]]:
        """(labels, value) of each series that an expression has now."""
        result = self.ask("query", query=expr)["result"]
        return [(one["metric"], float(one["value"][1])) for one in result]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()


@pytest.fixture
def four(tmp_path: Path) -> Iterator[FourProcesses]:
    with FourProcesses(tmp_path, "memory:16M") as processes:
        yield processes


def test_a_server_has_what_a_load_did_and_answers_every_query(
    tmp_path: Path, four: FourProcesses, requires_tool
) -> None:
    qemu_io = requires_tool("qemu-io")
    with (
        Daemon("exporter", "--listen", "0", "--host", str(four.directory)) as exporter,
        Prometheus(
            requires_tool("prometheus"), tmp_path, urllib.parse.urlsplit(exporter.line).netloc
        ) as server,
    ):
        subprocess.run(
            [qemu_io, "-f", "raw", "-c", "write 0 1M", "-c", "read 0 2M", four.uri],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip

        while sum(value for _, value in server.query("xvd_disk_read_bytes_total")) < 2 << 20:
            pass  # it scrapes again soon

        [(labels, value)] = server.query("xvd_disk_read_bytes_total")
        assert value == 2 << 20
        assert {name: labels[name] for name in ("job", "domain", "name", "vdev")} == {
            "job": "xvd", "domain": "1", "name": "guest-1", "vdev": "xvda",
        }  # fmt: skip
        reads = 'sum(xvd_disk_request_duration_seconds_bucket{op="read",le="+Inf"})'
        counted = 'sum(xvd_disk_requests_total{op="read"})'
        assert server.query(reads) == server.query(counted) != [({}, 0.0)]
        queries = [*dashboard_queries(), *alert_queries()]
        missing = [name for query in queries for name in query.series if not server.query(name)]
        assert missing == []
        for query in queries:
            server.query(query.plain)
        [group] = server.ask("rules")["groups"]
        assert {rule["name"] for rule in group["rules"]} == {it.where for it in alert_queries()}
