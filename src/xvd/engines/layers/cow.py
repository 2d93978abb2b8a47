# SPDX-License-Identifier: Apache-2.0
"""``cow``: what is written goes elsewhere, and the storage behind stays as it is (cow.pyx).

``cow:file=PATH`` keeps it in a sparse file, with ``PATH.map`` beside it that says which blocks are
there. A backend that is started anew goes on with both. They are of one run of this host's kernel:
after that they count as left over, and are begun anew. ``cow`` alone keeps it in memory, and a
backend that is started anew has nothing of it.
"""

import contextlib
import dataclasses
import errno
import mmap
import os
from collections.abc import Callable, Mapping
from typing import Final

import msgspec

from xvd.engines.cow import BlockMap, CowChannel, map_size
from xvd.engines.image import FileEngine
from xvd.engines.interface import Channel, Engine, EngineInfo
from xvd.engines.layers.base import Asked, Layer, LayerKind
from xvd.engines.memory import MemoryEngine
from xvd.errors import ConfigError, EngineError
from xvd.files import boot_id
from xvd.types import EngineOp

_HEADER: Final = 4096


class _Header(msgspec.Struct, frozen=True):
    """What a map is of."""

    base: str
    size: int
    block: int
    boot: str


class Cow(Layer):
    """`lower` as it is, but for what was written since; that is in `over`, of the same size, at the
    blocks that `blocks` tells. Closes all three."""

    def __init__(self, lower: Engine, over: Engine, blocks: BlockMap) -> None:
        super().__init__(lower)
        self.over = over
        self._blocks = blocks

    @property
    def info(self) -> EngineInfo:
        """That of the storage behind, but it can be written to."""
        return dataclasses.replace(
            super().info, read_only=False, can_flush=True,
            can_discard=self.over.info.can_discard, can_secure_discard=False,
            discard_granularity=self.over.info.discard_granularity,
            pins_pages=self.lower.info.pins_pages or self.over.info.pins_pages,
            thread_model=self.over.info.thread_model,
        )  # fmt: skip

    @property
    def identity(self) -> str:
        """Both."""
        return f"{self.over.identity} over {self.lower.identity}"

    @property
    def trouble(self) -> str:
        """That of either."""
        return self.over.trouble or self.lower.trouble

    def perform(self, asked: Asked, do: Callable[[], None]) -> None:
        """Flush what is written; reads and writes have ways of their own."""
        if asked.op is EngineOp.FLUSH:
            self.over.flush()
            return
        do()

    def read(self, buffer: memoryview, offset: int) -> None:
        """Read each run from where it is."""
        done = 0
        while done < buffer.nbytes:
            there, size = self._blocks.run_at(offset + done, buffer.nbytes - done)
            where = self.over if there else self.lower
            where.read(buffer[done : done + size], offset + done)
            done += size

    def write(self, buffer: memoryview, offset: int) -> None:
        """Write, and note where it is."""
        self.over.write(buffer, offset)
        self._blocks.note(offset, buffer.nbytes)

    def discard(self, offset: int, length: int) -> None:
        """Let a range be zeros, and note that it is there."""
        self.over.discard(offset, length)
        self._blocks.note(offset, length)

    def measure(self) -> int:
        """Its size stays."""
        return self.info.size

    def resize(self, _size: int) -> None:
        """Refuse."""
        raise EngineError(errno.EOPNOTSUPP, "a disk with a cow layer keeps its size")

    def open_channel(self) -> Channel:
        """A compiled channel to both."""
        base = self.lower.open_channel()
        try:
            return CowChannel(base, self.over.open_channel(), self._blocks)
        except BaseException:
            base.close()
            raise

    def close(self) -> None:
        """Close both, and let the map go."""
        with contextlib.ExitStack() as undo:
            undo.callback(self.lower.close)
            undo.callback(self.over.close)
            self._blocks.close()


def _in_memory(lower: Engine) -> Cow:
    info = lower.info
    memory = mmap.mmap(-1, map_size(info.size, info.logical_block_size))
    blocks = BlockMap(_exactly(memory, 0, info), info.size, info.logical_block_size)
    return Cow(lower, MemoryEngine(info.size), blocks)


def _exactly(memory: mmap.mmap, begin: int, info: EngineInfo) -> memoryview:
    return memoryview(memory)[begin : begin + map_size(info.size, info.logical_block_size)]


def _in_file(lower: Engine, path: str) -> Cow:
    info = lower.info
    header = _Header(lower.identity, info.size, info.logical_block_size, boot_id())
    fd = _open(path)
    if os.fstat(fd).st_size == 0:
        os.ftruncate(fd, info.size)
    os.close(fd)
    over = FileEngine(path, raw=True)  # its lock: from here on nobody else has the file or its map
    try:
        fresh = over.info.size != info.size
        if fresh:
            over.resize(info.size)
            over.measure()
        memory = _map(f"{path}.map", header, fresh=fresh)
        return Cow(lower, over, BlockMap(_exactly(memory, _HEADER, info), info.size, header.block))
    except BaseException:
        over.close()
        raise


def _open(path: str) -> int:
    """A file that is there, or a new one."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _map(path: str, header: _Header, *, fresh: bool) -> mmap.mmap:
    """The map in a file; one of zeros if it is not of this."""
    size = _HEADER + map_size(header.size, header.block)
    text = msgspec.json.encode(header).ljust(_HEADER, b"\0")
    with open(_open(path), "r+b", buffering=0) as file:
        if fresh or file.read(_HEADER) != text:
            file.truncate(0)
        # What cannot be had later would end the daemon by SIGBUS.
        os.posix_fallocate(file.fileno(), 0, size)
        memory = mmap.mmap(file.fileno(), size)
    memory[:_HEADER] = text
    return memory


def _make(lower: Engine, options: Mapping[str, str]) -> Engine:
    path = options["file"]
    if not path:
        return _in_memory(lower)
    if not os.path.isabs(path):
        raise ConfigError(f"cow:file={path}: write where that is, from / on")
    return _in_file(lower, path)


def _files(options: Mapping[str, str]) -> tuple[str, ...]:
    path = options["file"]
    return (path, f"{path}.map") if path else ()


LAYER = LayerKind(
    "cow",
    "keeps what is written elsewhere, and the storage as it is",
    "cow:file=/var/tmp/a",
    _make,
    {"file": ""},
    only_reads=True,
    files=_files,
)
