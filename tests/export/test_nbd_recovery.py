# SPDX-License-Identifier: Apache-2.0
"""Clients go on while the disk's backend is exchanged under them, and see every write kept in
order; parts of blocks and whole ones are written at once by several."""

import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from nbd_client import NbdClient
from served_disk import SMALL, Served, served_disk

READ, WRITE, DISC, FLUSH = range(4)
BLOCK, DEPTH = 4096, 16


class Verifier:
    """Writes to blocks of its own, `DEPTH` at a time, and reads each back: an older content than
    the last one that was acknowledged is an error."""

    def __init__(self, served: Served, number: int) -> None:
        self.client = NbdClient(served.socket).go()
        self.rng = random.Random(number)
        self.first = number * 64
        self.written: dict[int, int] = {}
        self.rounds = 0
        self.failure: BaseException | None = None
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.work)
        self.thread.start()

    def work(self) -> None:
        try:
            while not self.over.is_set():
                self.round()
                self.rounds += 1
        except BaseException as failure:
            self.failure = failure

    def round(self) -> None:
        blocks = self.rng.sample(range(self.first, self.first + 64), DEPTH)
        for block in blocks:
            version = self.written.get(block, 0) + 1
            self.written[block] = version
            data = content(block, version)
            self.client.request(WRITE, block * BLOCK, BLOCK, cookie=block, payload=data)
        assert sorted(self.client.reply().cookie for _ in blocks) == sorted(blocks)
        assert self.client.ask(FLUSH) == 0
        for block in blocks:
            self.client.request(READ, block * BLOCK, BLOCK, cookie=block)
        for _ in blocks:
            reply = self.client.reply()
            assert reply.error == 0
            expected = content(reply.cookie, self.written[reply.cookie])
            assert self.client.receive(BLOCK) == expected

    def end(self) -> None:
        self.over.set()
        self.thread.join()
        self.client.socket.close()
        if self.failure is not None:
            raise self.failure


def content(block: int, version: int) -> bytes:
    return (block << 32 | version).to_bytes(8, "big") * (BLOCK // 8)


def go_on(verifiers: list[Verifier]) -> None:
    """Wait until each has done another two rounds, or failed."""
    for one in verifiers:
        aim = one.rounds + 2
        while one.rounds < aim and one.failure is None:
            one.thread.join(0.001)


@pytest.mark.slow
@pytest.mark.parametrize("keep_journals", [True, False])
def test_clients_survive_their_disks_backends_under_load(
    tmp_path: Path, keep_journals: bool, expect_log: Callable[[str], None]
) -> None:
    if not keep_journals:
        expect_log("a backend that left no journal")
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(SMALL))
    with served_disk(str(image), tmp_path) as served:
        verifiers = [Verifier(served, number) for number in range(3)]
        for _ in range(4):
            go_on(verifiers)
            served.call(served.rig.restart_backend(keep_journals=keep_journals))
        go_on(verifiers)
        for one in verifiers:
            one.end()
        assert served.disk.connections == (1 if keep_journals else 5)


def test_a_client_that_comes_while_there_is_no_backend_is_served_by_the_next(
    tmp_path: Path,
) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(SMALL))
    with served_disk(str(image), tmp_path) as served, NbdClient(served.socket) as before:
        before.go().write(0, b"kept" * 1024)
        assert served.rig._server is not None
        served.call(served.rig._server.close())
        with NbdClient(served.socket) as during:
            during.go()
            during.request(READ, 0, BLOCK, cookie=1)
            before.request(WRITE, BLOCK, BLOCK, cookie=2, payload=b"late" * 1024)
            served.call(served.rig.start_backend())
            assert during.reply() == (1, 0, None, b"")
            assert during.receive(BLOCK) == b"kept" * 1024
            assert before.reply().error == 0
            assert during.read(BLOCK, BLOCK) == b"late" * 1024


@pytest.mark.slow
def test_parts_of_blocks_and_whole_ones_written_at_once_are_both_kept(tmp_path: Path) -> None:
    """One client writes whole blocks to the left half of a span and its neighbour parts of the
    same blocks' right half: a read, change and write must not undo the other's."""
    rounds = 60
    with served_disk(f"memory:{SMALL}", tmp_path) as served:
        with NbdClient(served.socket) as whole, NbdClient(served.socket) as parts:
            whole.go()
            parts.go()
            for turn in range(1, rounds):
                mark = bytes([turn])
                for n in range(8):
                    # 512-byte blocks 2n and 2n+1: the second one's tail is the other client's.
                    whole.request(WRITE, n * 1024, 512, payload=mark * 512)
                    parts.request(WRITE, n * 1024 + 500, 500, payload=mark * 500)
                assert [whole.reply().error for _ in range(8)] == [0] * 8
                assert [parts.reply().error for _ in range(8)] == [0] * 8
                data = whole.read(0, 8 * 1024)
                for n in range(8):
                    block = data[n * 1024 : (n + 1) * 1024]
                    assert block[:1000] == mark * 1000
                    assert block[1000:] == bytes(24)


@pytest.mark.slow
def test_a_part_of_a_block_waits_for_the_whole_block_that_is_under_way(tmp_path: Path) -> None:
    with served_disk("memory:1M", tmp_path, layers=["delay:write=0.2s"]) as served:
        with NbdClient(served.socket) as whole, NbdClient(served.socket) as part:
            whole.go()
            part.go()
            whole.request(WRITE, 0, 512, payload=b"w" * 512)
            while served.disk.counters().requests < 1:
                pass
            assert part.write(100, b"part") == 0
            assert whole.reply().error == 0
            assert part.read(0, 512) == b"w" * 100 + b"part" + b"w" * 408


@pytest.mark.slow
def test_a_whole_block_waits_for_the_part_that_is_being_changed(tmp_path: Path) -> None:
    with served_disk("memory:1M", tmp_path, layers=["delay:read=0.2s"]) as served:
        with NbdClient(served.socket) as whole, NbdClient(served.socket) as part:
            whole.go()
            part.go()
            part.request(WRITE, 100, 4, payload=b"part")
            while served.disk.counters().requests < 1:
                pass
            assert whole.write(0, b"w" * 512) == 0
            assert part.reply().error == 0
            assert part.read(0, 512) == b"w" * 512


def test_a_disk_that_has_gone_fails_every_request(served: Served) -> None:
    with NbdClient(served.socket) as client:
        client.go().write(0, bytes(512))
        served.call(served.disk.close())
        assert client.ask(READ, 0, 512) == 108
        assert client.ask(FLUSH) == 108
