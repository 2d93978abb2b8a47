# SPDX-License-Identifier: Apache-2.0
"""Write to an image through a Xen ring, and find the bytes in the file.

The host is emulated and lives in this process. ``python examples/image.py`` needs no argument and
leaves nothing behind.
"""

import asyncio
import tempfile
from pathlib import Path

from xvd import EmulatedHost

OFFSET, TEXT = 12345, b"any size, any alignment"


async def write(image: Path) -> None:
    """With an event loop: operations that are awaited together are in flight together."""
    async with EmulatedHost.serving(image) as disk:
        print(f"a disk of {disk.size >> 20} MiB in blocks of {disk.logical_block_size} bytes")
        await asyncio.gather(*(disk.write(OFFSET + (n << 20), TEXT) for n in range(8)))
        await disk.flush()


def read(image: Path) -> None:
    """Without one, and without leave to write."""
    with EmulatedHost.serving(image, read_only=True) as disk:
        print("through the ring:", bytes(disk.read(OFFSET, len(TEXT))))
        try:
            disk.write(0, b"no")
        except OSError as error:
            print("a write is refused:", error.strerror)


def main() -> None:
    """Both, on an image of our own."""
    with tempfile.TemporaryDirectory() as directory:
        image = Path(directory) / "disk.img"
        with image.open("wb") as file:
            file.truncate(16 << 20)
        asyncio.run(write(image))
        read(image)
        data = image.read_bytes()
        print("in the file:", data.count(TEXT), "times, first at", data.index(TEXT))


if __name__ == "__main__":
    main()
