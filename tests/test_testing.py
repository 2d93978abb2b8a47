# SPDX-License-Identifier: Apache-2.0
"""The backend that is driven by hand, against a frontend that is honest."""

import asyncio
from pathlib import Path

import pytest

from xvd import ConfigError, Disk
from xvd.blkif.abi import Op
from xvd.blkif.messages import DiscardRequest, Request, Response
from xvd.errors import LocalProtocolError
from xvd.testing import RawBackend, raw_backend
from xvd.types import RequestId


async def connected(directory: Path, backend: RawBackend) -> Disk:
    opening = asyncio.ensure_future(Disk.connect(directory, domid=1, vdev="xvda").__aenter__())
    await backend.connect({"sectors": "64"})
    return await opening


def test_it_serves_what_the_test_says(tmp_path: Path) -> None:
    async def work() -> None:
        async with raw_backend(tmp_path) as backend:
            disk = await connected(tmp_path, backend)
            reading = asyncio.ensure_future(disk.read(512, 1024))
            request = await backend.request()
            backend.fill(request, b"a" * 512 + b"b" * 512)
            backend.answer(request)

            assert isinstance(request, Request)
            assert (request.operation, request.sector_number, disk.size) == (Op.READ, 1, 64 * 512)
            assert await reading == b"a" * 512 + b"b" * 512
            await disk.close(timeout_s=0)

    asyncio.run(work())


def test_it_hears_what_the_frontend_writes_and_refuses_it(tmp_path: Path) -> None:
    async def work() -> None:
        async with raw_backend(tmp_path) as backend:
            disk = await connected(tmp_path, backend)
            writing = asyncio.ensure_future(disk.write(0, b"w" * 512))
            request = await backend.request()
            heard = backend.received(request)
            backend.answer(request, -1)

            assert heard == b"w" * 512
            with pytest.raises(OSError, match="WRITE of 1 sectors at 0"):
                await writing
            await disk.close(timeout_s=0)

    asyncio.run(work())


def test_it_says_what_it_cannot_do(tmp_path: Path) -> None:
    async def work() -> None:
        async with raw_backend(tmp_path) as backend:
            disk = await connected(tmp_path, backend)

            with pytest.raises(ConfigError, match="has no segments of its own"):
                backend.received(DiscardRequest(RequestId(1), 0, 8))
            with pytest.raises(LocalProtocolError, match="answers no request"):
                backend.respond(Response(RequestId(1), Op.READ))
            await disk.close(timeout_s=0)

    asyncio.run(work())


def test_it_ends_as_its_frontend_does(tmp_path: Path) -> None:
    async def work() -> None:
        async with raw_backend(tmp_path) as backend:
            disk = await connected(tmp_path, backend)
            closing = asyncio.ensure_future(disk.close())
            await backend.until_closed()
            backend.close()
            await backend.write({"state": "6"})

            await closing

    asyncio.run(work())
