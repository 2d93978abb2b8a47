# SPDX-License-Identifier: Apache-2.0
"""Storage that completes behind a thread's back tells of it only to one that is about to sleep."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ceph import running_cluster
from qemu_img import run_qemu_img
from rig_ports import ByPorts

from xvd.engines.interface import Engine
from xvd.engines.uri import open_engine

Tool = Callable[[str], str]
SIZE = 1 << 20


@pytest.fixture
def qcow2(tmp_path: Path, requires_tool: Tool) -> Iterator[Engine]:
    requires_tool("qemu-storage-daemon")
    image = tmp_path / "disk.qcow2"
    run_qemu_img(requires_tool("qemu-img"), "create", "-q", "-f", "qcow2", image, SIZE)
    engine = open_engine(f"qcow2:{image}")
    yield engine
    engine.close()


@pytest.fixture
def rbd(tmp_path: Path, requires_tool: Tool) -> Iterator[Engine]:
    with running_cluster(tmp_path / "ceph", requires_tool) as cluster:
        engine = open_engine(cluster.image("told", SIZE))
        yield engine
        engine.close()


@pytest.fixture(params=["qcow2", pytest.param("rbd", marks=[pytest.mark.slow, pytest.mark.tools])])
def ports(request: pytest.FixtureRequest) -> Iterator[ByPorts]:
    channel = request.getfixturevalue(request.param).open_channel()
    yield ByPorts(channel)
    channel.close()


def test_a_thread_that_never_asks_is_told_of_all(ports: ByPorts) -> None:
    for _ in range(2):
        ports.begin_read()
        ports.take_once_told()


def test_a_thread_that_looks_is_not_told(ports: ByPorts) -> None:
    ports.may_sleep()
    ports.begin_read()
    ports.take_once_told()

    for _ in range(3):
        ports.begin_read()
        ports.look_until_done()
        assert ports.take()

    assert not ports.is_told()


def test_a_thread_that_asks_is_told_each_time(ports: ByPorts) -> None:
    for _ in range(3):
        ports.begin_read()
        if ports.may_sleep():
            assert ports.is_told(30)
        ports.look_until_done()
        assert not ports.may_sleep()
        assert ports.take()


def test_a_thread_to_which_it_is_new_is_told_of_all(ports: ByPorts) -> None:
    ports.may_sleep()

    ports.attach()

    for _ in range(2):
        ports.begin_read()
        ports.take_once_told()


def test_a_channel_that_a_thread_had_serves_calls(qcow2: Engine) -> None:
    channel = qcow2.open_channel()
    ByPorts(channel).may_sleep()
    channel.close()

    found = bytearray(b"?" * 512)
    for _ in range(2):
        qcow2.read(memoryview(found), 0)

    assert found == bytes(512)
