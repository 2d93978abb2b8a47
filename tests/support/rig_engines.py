# SPDX-License-Identifier: Apache-2.0
"""Every engine and every layer, by name: how to make one of a given size."""

from collections.abc import Callable
from pathlib import Path

from xvd.engines.bridge import BridgeChannel
from xvd.engines.image import FileEngine
from xvd.engines.interface import Engine, EngineInfo, ThreadModel
from xvd.engines.layers.delay import Delay
from xvd.engines.layers.error import Error
from xvd.engines.layers.log import Log
from xvd.engines.layers.rate import Rate
from xvd.engines.layers.stats import Stats
from xvd.engines.layers.zeroes import DetectZeroes
from xvd.engines.live.mirror import Mirror
from xvd.engines.live.tracked import ChangeMap, Tracked, map_size
from xvd.engines.memory import MemoryEngine
from xvd.engines.uri import add_layer

SIZE = 1 << 20


class PythonEngine(Engine):
    """What somebody would write: a bytearray."""

    def __init__(self, size: int, model: ThreadModel = ThreadModel.SERIAL) -> None:
        self.data = bytearray(size)
        self._info = EngineInfo(size=size, can_discard=True, thread_model=model)
        self.flushes = 0
        self.closed = 0

    @property
    def info(self) -> EngineInfo:
        return self._info

    def read(self, buffer: memoryview, offset: int) -> None:
        buffer[:] = self.data[offset : offset + len(buffer)]

    def write(self, buffer: memoryview, offset: int) -> None:
        self.data[offset : offset + len(buffer)] = buffer

    def flush(self) -> None:
        self.flushes += 1

    def discard(self, offset: int, length: int) -> None:
        self.data[offset : offset + length] = bytes(length)

    def close(self) -> None:
        self.closed += 1


class ByHand(MemoryEngine):
    """Storage whose operations the test completes."""

    def open_channel(self) -> BridgeChannel:
        self.channel = BridgeChannel()
        return self.channel


def image(where: Path, size: int = SIZE) -> Path:
    where.mkdir(exist_ok=True)
    path = where / "disk.img"
    path.touch()
    with path.open("r+b") as file:
        file.truncate(size)
    return path


def nothing(_: object) -> None:
    """Sleeps for no time, or logs to nobody."""


ENGINES: dict[str, Callable[[Path], Engine]] = {
    "memory": lambda where: MemoryEngine(SIZE),
    "file, direct": lambda where: FileEngine(str(image(where))),
    "file, buffered": lambda where: FileEngine(str(image(where)), direct=False),
    "python, serial": lambda where: PythonEngine(SIZE),
    "python, parallel": lambda where: PythonEngine(SIZE, ThreadModel.PARALLEL),
    "stats": lambda where: Stats(MemoryEngine(SIZE)),
    "log": lambda where: Log(MemoryEngine(SIZE), emit=nothing),
    "delay": lambda where: Delay(MemoryEngine(SIZE), read_s=1, write_s=1, sleep=nothing),
    "delay, compiled": lambda where: Delay(
        MemoryEngine(SIZE), read_s=1e-4, write_s=2e-4, flush_s=1e-4, discard_s=1e-4
    ),
    "delay of an image": lambda where: Delay(
        FileEngine(str(image(where))), read_s=1e-4, write_s=2e-4
    ),
    "rate, compiled": lambda where: Rate(MemoryEngine(SIZE), each_s=1e-4, byte_s=1e-9),
    "rate": lambda where: Rate(MemoryEngine(SIZE), each_s=1, sleep=nothing),
    "error, never": lambda where: Error(MemoryEngine(SIZE), operations=()),
    "cow": lambda where: add_layer(MemoryEngine(SIZE), "cow"),
    "cow in a file": lambda where: add_layer(
        FileEngine(str(image(where))), f"cow:file={where}/over"
    ),
    "detect-zeroes": lambda where: DetectZeroes(MemoryEngine(SIZE)),
    "detect-zeroes of an image": lambda where: DetectZeroes(FileEngine(str(image(where)))),
    "detect-zeroes of an engine in Python": lambda where: DetectZeroes(PythonEngine(SIZE)),
    "tracked": lambda where: Tracked(
        MemoryEngine(SIZE), [ChangeMap(bytearray(map_size(SIZE)), SIZE)]
    ),
    "mirror": lambda where: Mirror(MemoryEngine(SIZE), MemoryEngine(SIZE)),
    "mirror between files": lambda where: Mirror(
        FileEngine(str(image(where))), FileEngine(str(image(where / "target")))
    ),
    "stats on file": lambda where: Stats(FileEngine(str(image(where)))),
}
