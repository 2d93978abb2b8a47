# SPDX-License-Identifier: Apache-2.0
"""Back up a disk into a sparse file, and check the copy against what was read.

    python examples/backup.py SOURCE COPY               # an image, or any storage xvd knows
    python examples/backup.py HOST DOMID VDEV COPY      # a disk of a guest that is shut down
    python examples/backup.py                           # an image of its own, and nothing is left

A guest that runs uses its disk itself: ``xvd backup`` copies that one.
"""

import asyncio
import hashlib
import sys
import tempfile
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from xvd import Disk, EmulatedHost

CHUNK = 1 << 20
"""Bytes of one read."""
AT_ONCE = 8
"""Reads that are in flight together."""


async def backup(disk: Disk, copy: Path) -> tuple[str, int]:
    """Write the disk's content to `copy`; its SHA-256, and the bytes that are not zeros."""
    digest, data = hashlib.sha256(), 0
    with copy.open("xb") as file:
        for start in range(0, disk.size, AT_ONCE * CHUNK):
            offsets = range(start, min(start + AT_ONCE * CHUNK, disk.size), CHUNK)
            reads = [disk.read(at, min(CHUNK, disk.size - at)) for at in offsets]
            for offset, chunk in zip(offsets, await asyncio.gather(*reads), strict=True):
                digest.update(chunk)
                if any(chunk):  # a hole is left where there are only zeros
                    file.seek(offset)
                    file.write(chunk)
                    data += len(chunk)
        file.truncate(disk.size)
    return digest.hexdigest(), data


async def run(source: AbstractAsyncContextManager[Disk], copy: Path) -> int:
    """Back up, and read the copy once more; the exit status."""
    async with source as disk:
        size = disk.size
        digest, data = await backup(disk, copy)
    print(f"{size >> 20} MiB read, {data >> 20} MiB written, SHA-256 {digest[:16]}...")
    with copy.open("rb") as file:
        same = hashlib.file_digest(file, "sha256").hexdigest() == digest
    print("the copy is the same" if same else "the copy differs")
    return 0 if same else 1


def example() -> int:
    """Back up an image of our own."""
    with tempfile.TemporaryDirectory() as directory:
        image, copy = Path(directory) / "disk.img", Path(directory) / "copy.img"
        with image.open("wb") as file:
            file.truncate(64 << 20)
            file.seek(5 << 20)
            file.write(b"data" * 1000)
        source = EmulatedHost.serving(image, read_only=True)
        return asyncio.run(run(source, copy))


def main(arguments: list[str]) -> int:
    """Do as the arguments say."""
    match arguments:
        case []:
            return example()
        case [storage, copy]:
            return asyncio.run(run(EmulatedHost.serving(storage, read_only=True), Path(copy)))
        case [host, domid, vdev, copy]:
            return asyncio.run(_guest(host, int(domid), vdev, Path(copy)))
    print(__doc__, file=sys.stderr)
    return 2


async def _guest(host: str, domid: int, vdev: str, copy: Path) -> int:
    return await run(Disk.connect(host, domid=domid, vdev=vdev), copy)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
