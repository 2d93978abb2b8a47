# SPDX-License-Identifier: Apache-2.0
"""Scrapes by HTTP, over both kinds of sockets, and into a file."""

import http.client
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from xvd.errors import ConfigError
from xvd.service.exporter import (
    CONNECTIONS_MAX,
    DaemonCollector,
    listen_tcp,
    registry_of,
    serving,
    write_textfile,
)
from xvd.service.metrics import Daemon, Scrape
from xvd.sockets import claim

DISK = {"disk": "1/xvda", "state": "CONNECTED", "counters": {"rd_sect": 16}}
READ = b'xvd_disk_read_bytes_total{domain="1",name="web",vdev="xvda"} 8192.0\n'


def look() -> Scrape:
    told = [DISK, {"counters": "none"}]
    return Scrape([Daemon("backend-0", True, 0.0, {}, told)], {"1": "web"}, {"ask": 1}, "1")


@pytest.fixture
def address() -> Iterator[tuple[str, int]]:
    listener = listen_tcp("127.0.0.1", 0)
    where = listener.getsockname()
    with serving(registry_of(look), listener):
        yield where


def test_a_scrape_by_tcp(address: tuple[str, int]) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{address[1]}/metrics") as answer:
        text = answer.read()

    assert answer.status == 200
    assert READ in text


def test_a_scrape_of_some_metrics(address: tuple[str, int]) -> None:
    url = f"http://127.0.0.1:{address[1]}/metrics?name[]=xvd_disk_read_bytes_total"
    with urllib.request.urlopen(url) as answer:
        text = answer.read()

    assert [line for line in text.splitlines(keepends=True) if not line.startswith(b"#")] == [READ]


def test_a_scrape_by_a_unix_socket(tmp_path: Path) -> None:
    claimed = claim(tmp_path / "exporter.sock")
    with serving(registry_of(look), claimed.socket):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(claimed.path))
            connection = http.client.HTTPConnection("localhost")
            connection.sock = client
            connection.request("GET", "/metrics")
            answer = connection.getresponse()

            assert (answer.status, READ in answer.read()) == (200, True)


def test_nothing_but_reading_is_allowed(address: tuple[str, int]) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"http://127.0.0.1:{address[1]}/metrics", data=b"x")

    assert caught.value.code == 405
    caught.value.close()


def test_more_connections_than_there_are_places_are_closed(address: tuple[str, int]) -> None:
    idle = [socket.create_connection(address) for _ in range(CONNECTIONS_MAX)]

    with socket.create_connection(address) as another:
        assert another.recv(1) == b""

    for connection in idle:
        connection.close()


def test_errors_add_up_over_scrapes() -> None:
    collector = DaemonCollector(look)
    list(collector.collect())

    [errors] = [it for it in collector.collect() if it.name == "xvd_exporter_errors"]

    assert {sample.labels["what"]: sample.value for sample in errors.samples} == {
        "ask": 2, "figures": 2, "names": 0,
    }  # fmt: skip


def test_an_address_that_is_taken(address: tuple[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"127.0.0.1:{address[1]}: cannot listen there .*another"):
        listen_tcp(*address)


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "xvd.prom"
    path.write_text("old")
    with path.open() as reader:
        write_textfile(registry_of(look), path)

        assert reader.read() == "old"

    assert READ in path.read_bytes()
    assert os.listdir(tmp_path) == ["xvd.prom"]


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "xvd.prom"
    path.mkdir()

    with pytest.raises(IsADirectoryError):
        write_textfile(registry_of(look), path)

    assert os.listdir(tmp_path) == ["xvd.prom"]
