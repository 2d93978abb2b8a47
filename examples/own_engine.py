# SPDX-License-Identifier: Apache-2.0
"""Storage of one's own: a disk in memory that keeps each block's content once, however often it is
written. ``python examples/own_engine.py`` serves it through a Xen ring and shows what it keeps.

An engine says what it is (`info`) and does what arrives, which is checked: whole blocks, within its
size. docs/engines.md has the contract, and `xvd.Engine` each call.
"""

import hashlib

from xvd import EmulatedHost, Engine, EngineInfo

BLOCK = 4096
"""Bytes: what the guest sees as a block of the disk."""


class Deduplicated(Engine):
    """`size` bytes that read as zeros until they are written. Its calls come one at a time."""

    def __init__(self, size: int) -> None:
        self._info = EngineInfo(size, logical_block_size=BLOCK, can_discard=True)
        self._at: dict[int, bytes] = {}  # by the block's number: the name of what it holds
        self._contents: dict[bytes, tuple[bytes, int]] = {}  # by its name: a content, and its users

    @property
    def info(self) -> EngineInfo:
        """What is promised to the guest."""
        return self._info

    def read(self, buffer: memoryview, offset: int) -> None:
        """Fill the guest's pages."""
        for at in range(0, len(buffer), BLOCK):
            name = self._at.get((offset + at) // BLOCK)
            buffer[at : at + BLOCK] = self._contents[name][0] if name else bytes(BLOCK)

    def write(self, buffer: memoryview, offset: int) -> None:
        """Keep what is new."""
        for at in range(0, len(buffer), BLOCK):
            content = bytes(buffer[at : at + BLOCK])
            name = hashlib.sha256(content).digest()
            self._forget((offset + at) // BLOCK)
            _, users = self._contents.get(name, (content, 0))
            self._contents[name] = content, users + 1
            self._at[(offset + at) // BLOCK] = name

    def discard(self, offset: int, length: int) -> None:
        """Keep nothing there."""
        for block in range(offset // BLOCK, (offset + length) // BLOCK):
            self._forget(block)

    def _forget(self, block: int) -> None:
        name = self._at.pop(block, None)
        if name is not None:
            content, users = self._contents.pop(name)
            if users > 1:
                self._contents[name] = content, users - 1

    def figures(self) -> str:
        """How much is written, and how much is kept."""
        return f"{len(self._at)} blocks written, {len(self._contents)} kept"


def main() -> None:
    """Write the same to many places, and something else to one of them."""
    engine = Deduplicated(64 << 20)
    with EmulatedHost.serving(engine) as disk:
        for place in range(16):
            disk.write(place << 20, b"the same everywhere".ljust(BLOCK, b"."))
        print(engine.figures())
        disk.write(3 << 20, b"another".ljust(BLOCK, b"."))
        print(engine.figures())
        print(
            "at 3 MiB:", bytes(disk.read(3 << 20, 7)), "and before:", bytes(disk.read(2 << 20, 8))
        )
        disk.discard(0, 16 << 20)
        print(engine.figures())


if __name__ == "__main__":
    main()
