# SPDX-License-Identifier: Apache-2.0
"""What every engine and layer does, called from Python and driven by a queue's own thread."""

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest
from rig_engines import ENGINES, SIZE, PythonEngine, image
from rig_queue import QueueWorld, discard, rq

from xvd.blkif.abi import Op, Status
from xvd.engines.checked import Checked
from xvd.engines.image import FileEngine
from xvd.engines.interface import Engine, describe
from xvd.engines.layers.error import Error
from xvd.engines.layers.readonly import ReadOnly
from xvd.engines.memory import MemoryEngine
from xvd.engines.null import NullEngine
from xvd.errors import EngineError

PATTERN = bytes(range(256)) * 64  # 16 KiB


@pytest.fixture(params=list(ENGINES))
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    made = Checked(ENGINES[request.param](tmp_path))
    yield made
    made.close()


@pytest.fixture(params=[False, True], ids=["map", "copy"])
def world(request: pytest.FixtureRequest, engine: Engine) -> Iterator[QueueWorld]:
    with QueueWorld(engine, copying=request.param) as queue_world, queue_world.running():
        yield queue_world


def read(engine: Engine, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    engine.read(memoryview(buffer), offset)
    return bytes(buffer)


def write(engine: Engine, offset: int, data: bytes) -> None:
    engine.write(memoryview(bytearray(data)), offset)


# ---- Called from Python ----


def test_fresh_storage_reads_as_zeros(engine: Engine) -> None:
    assert read(engine, SIZE - 4096, 4096) == bytes(4096)


@pytest.mark.parametrize("offset", [0, 512, 4096, 5120, SIZE - 16384])
def test_what_is_written_is_read(engine: Engine, offset: int) -> None:
    write(engine, offset, PATTERN)
    assert read(engine, offset, 16384) == PATTERN


def test_neighbours_are_left_alone(engine: Engine) -> None:
    write(engine, 0, b"n" * 4096)
    write(engine, 512, b"m" * 512)
    assert read(engine, 0, 1536) == b"n" * 512 + b"m" * 512 + b"n" * 512


def test_a_flush_returns(engine: Engine) -> None:
    write(engine, 0, b"f" * 512)
    engine.flush()
    assert read(engine, 0, 512) == b"f" * 512


def test_a_discard_touches_nothing_outside_its_range(engine: Engine) -> None:
    write(engine, 0, PATTERN)
    engine.discard(4096, 4096)
    assert read(engine, 0, 4096) == PATTERN[:4096]
    assert read(engine, 8192, 8192) == PATTERN[8192:]


@pytest.mark.parametrize("offset", [0, 4096, SIZE])
def test_a_discard_of_nothing_succeeds(engine: Engine, offset: int) -> None:
    write(engine, 0, PATTERN)
    engine.discard(offset, 0)
    if engine.info.can_secure_discard:
        engine.secure_discard(offset, 0)
    assert read(engine, 0, 16384) == PATTERN


def test_an_erased_range_is_gone_or_it_is_refused(engine: Engine) -> None:
    write(engine, 0, PATTERN)
    if engine.info.can_secure_discard:
        engine.secure_discard(4096, 4096)
        assert read(engine, 0, 16384) == PATTERN[:4096] + bytes(4096) + PATTERN[8192:]
    else:
        with pytest.raises(EngineError, match="erase securely"):
            engine.secure_discard(4096, 4096)
        assert read(engine, 0, 16384) == PATTERN


@pytest.mark.parametrize(
    ("offset", "length"),
    [(SIZE, 512), (SIZE - 512, 1024), (-512, 512), (2**63, 512), (0, SIZE + 512)],
)
def test_what_is_not_on_the_disk_is_refused(engine: Engine, offset: int, length: int) -> None:
    for call in (
        lambda: read(engine, offset, length),
        lambda: write(engine, offset, bytes(length)),
        lambda: engine.discard(offset, length),
    ):
        with pytest.raises(EngineError, match="not within") as caught:
            call()
        assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize(("offset", "length"), [(1, 512), (0, 511), (256, 256), (512, 1)])
def test_what_is_no_whole_block_is_refused(engine: Engine, offset: int, length: int) -> None:
    with pytest.raises(EngineError, match="not whole blocks of 512"):
        read(engine, offset, length)


def test_the_info_is_that_of_a_disk(engine: Engine) -> None:
    info = engine.info
    assert (info.size, info.logical_block_size, info.read_only) == (SIZE, 512, False)
    assert info.can_flush
    assert info.can_discard
    assert describe(engine)["size"] == SIZE


def test_closing_twice_is_harmless(engine: Engine) -> None:
    engine.close()
    engine.close()


# ---- Driven by a queue ----


def test_a_queue_reads_what_it_wrote(world: QueueWorld) -> None:
    for page in range(11):
        world.data(page)[:] = bytes([65 + page]) * 4096
    world.send(rq(Op.WRITE, 8, *(world.segment(page) for page in range(11))))
    world.port.notify()
    [written] = world.collect(1)
    world.send(rq(Op.READ, 8, *(world.segment(11 + page) for page in range(11))))
    world.port.notify()
    [found] = world.collect(1)
    assert (written.status, found.status) == (0, 0)
    assert [bytes(world.data(11 + page)) for page in range(11)] == [
        bytes([65 + page]) * 4096 for page in range(11)
    ]


@pytest.mark.parametrize(
    "parts", [[(0, 0)], [(7, 7), (0, 0)], [(1, 6), (0, 7)], [(3, 3)] * 5, [(0, 7), (2, 4), (7, 7)]]
)
def test_parts_of_any_alignment(world: QueueWorld, parts: list[tuple[int, int]]) -> None:
    wanted = b""
    for page, (first, last) in enumerate(parts):
        chunk = bytes([97 + page]) * ((last - first + 1) * 512)
        world.data(page)[first * 512 : (last + 1) * 512] = chunk
        wanted += chunk
    segments = [world.segment(page, *part) for page, part in enumerate(parts)]
    world.send(rq(Op.WRITE, 3, *segments))
    world.port.notify()
    [written] = world.collect(1)
    sectors = len(wanted) // 512
    whole = [world.segment(20 + i, 0, min(7, sectors - 8 * i - 1)) for i in range(-(-sectors // 8))]
    world.send(rq(Op.READ, 3, *whole))
    world.port.notify()
    [found] = world.collect(1)
    assert (written.status, found.status) == (0, 0)
    assert bytes(world.pages.view[20 * 4096 : 20 * 4096 + len(wanted)]) == wanted


@pytest.mark.parametrize("sector", [0, 8, SIZE // 512])
def test_a_discard_of_nothing_is_answered(world: QueueWorld, sector: int) -> None:
    world.send(discard(sector, 0))
    world.port.notify()
    [answer] = world.collect(1)
    assert answer.status == Status.OKAY


def test_a_full_ring_of_all_kinds(world: QueueWorld) -> None:
    requests = [rq(Op.WRITE, 8 * i, world.segment(i), id=i) for i in range(16)]
    requests += [rq(Op.FLUSH_DISKCACHE, id=16 + i) for i in range(8)]
    world.send(*requests, *(discard(1024 + 8 * i, 8, id=24 + i) for i in range(8)))
    world.port.notify()
    answers = world.collect(32)
    assert {answer.id: answer.status for answer in answers} == dict.fromkeys(range(32), 0)


# ---- Errors ----


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (errno.EIO, Status.ERROR),
        (errno.ENOSPC, Status.ERROR),
        (errno.EOPNOTSUPP, Status.EOPNOTSUPP),
    ],
)
def test_a_failing_engine_fails_that_request_only(number: int, status: Status) -> None:
    engine = Error(
        MemoryEngine(SIZE), one_in=1, operations=("write", "flush", "discard"), error=number
    )
    with QueueWorld(Checked(engine)) as world, world.running():
        world.send(
            rq(Op.WRITE, 0, world.segment(0), id=1), rq(Op.FLUSH_DISKCACHE, id=2),
            discard(0, 8, id=3), rq(Op.READ, 0, world.segment(1), id=4),
        )  # fmt: skip
        world.port.notify()
        answers = {answer.id: answer.status for answer in world.collect(4)}
    assert answers == {1: status, 2: status, 3: status, 4: Status.OKAY}


class Careless(PythonEngine):
    """An engine that breaks its contract."""

    def read(self, buffer: memoryview, offset: int) -> None:
        raise ZeroDivisionError("a bug")

    def write(self, buffer: memoryview, offset: int) -> None:
        raise OSError("an error without a number")


def test_an_engines_bug_is_an_error_of_that_request(expect_log) -> None:
    expect_log("Careless failed in a way that engines may not")
    with QueueWorld(Checked(Careless(SIZE))) as world, world.running():
        world.send(rq(Op.READ, 0, world.segment(0), id=1), rq(Op.WRITE, 0, world.segment(0), id=2))
        world.send(rq(Op.FLUSH_DISKCACHE, id=3))
        world.port.notify()
        answers = {answer.id: answer.status for answer in world.collect(3)}
    assert answers == {1: Status.ERROR, 2: Status.ERROR, 3: Status.OKAY}


@pytest.mark.parametrize("kind", ["layer", "file"])
def test_a_read_only_engine_says_so_and_holds_to_it(kind: str, tmp_path: Path) -> None:
    lower = (
        ReadOnly(MemoryEngine(SIZE))
        if kind == "layer"
        else FileEngine(str(image(tmp_path)), read_only=True)
    )
    engine = Checked(lower)
    for call in (lambda: write(engine, 0, bytes(512)), lambda: engine.discard(0, 512)):
        with pytest.raises(EngineError) as caught:
            call()
        assert caught.value.errno == errno.EROFS
    assert (engine.info.read_only, engine.info.can_discard) == (True, False)
    assert read(engine, 0, 512) == bytes(512)
    engine.close()


def test_null_storage_forgets() -> None:
    engine = Checked(NullEngine(SIZE))
    write(engine, 0, b"n" * 512)
    assert read(engine, 0, 512) == bytes(512)
    with QueueWorld(engine) as world:
        world.data(0)[:] = b"n" * 4096
        answers = world.ask(
            rq(Op.WRITE, 0, world.segment(0)), rq(Op.READ, 0, world.segment(0)), discard(0, 8),
            rq(Op.FLUSH_DISKCACHE),
        )  # fmt: skip
        assert [answer.status for answer in answers] == [0] * 4
        assert bytes(world.data(0)) == bytes(4096)


def test_null_storage_may_leave_what_is_read_as_it_was() -> None:
    with QueueWorld("null:1M,read-zeroes=off") as world:
        world.data(0)[:] = b"n" * 4096
        [answer] = world.ask(rq(Op.READ, 0, world.segment(0)))
        assert (answer.status, bytes(world.data(0))) == (0, b"n" * 4096)
