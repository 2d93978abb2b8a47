# SPDX-License-Identifier: Apache-2.0
"""A driver author's test: a PV driver against a backend that lies to it.

    python examples/lying_backend.py COMMAND...     # a driver of yours; DIR, DOMID and VDEV follow
    python examples/lying_backend.py                # xvd's own frontend, in this process

The driver joins the emulated host in DIR (docs/own-driver.md) and reads or writes its disk, and
ends with status 0 if that went well. Of a lie it must notice, and end with another status: a driver
that hangs, crashes or believes the lie fails. The status is 1 if one of them was not noticed.
"""

import asyncio
import shutil
import sys
import tempfile
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from xvd import Disk, XvdError
from xvd.blkif.abi import Op, Status
from xvd.blkif.messages import AnyRequest, Request, Response
from xvd.testing import RawBackend, raw_backend
from xvd.types import RequestId

SECONDS = 10
"""For the driver to end."""
Driver = Callable[[str, int, str], Awaitable[int]]


async def honest(backend: RawBackend) -> None:
    """Serve like any backend, from memory, until the driver closes the disk."""
    await backend.connect()
    serving = asyncio.ensure_future(serve(backend))
    await backend.until_closed()
    serving.cancel()
    backend.close()
    await backend.write({"state": "6"})


async def serve(backend: RawBackend) -> None:
    """Answer everything."""
    storage: dict[int, bytes] = {}
    while True:
        request = await backend.request()
        keep(backend, request, storage)
        backend.answer(request)


def keep(backend: RawBackend, request: AnyRequest, storage: dict[int, bytes]) -> None:
    """Move a request's data."""
    if not isinstance(request, Request):
        return
    if request.operation == Op.WRITE:
        data = backend.received(request)
        for at in range(0, len(data), 512):
            storage[request.sector_number + at // 512] = data[at : at + 512]
    elif request.operation == Op.READ:
        sectors = range(request.sector_number, request.sector_number + 256)
        backend.fill(request, b"".join(storage.get(at, bytes(512)) for at in sectors))


async def garbage_for_a_size(backend: RawBackend) -> None:
    """Publish a size that is no number."""
    await backend.connect({"sectors": "many"})


async def an_answer_to_nothing(backend: RawBackend) -> None:
    """Answer a request that was never made."""
    await backend.connect()
    await backend.request()
    backend.respond(Response(RequestId(0xDEAD), Op.READ))


async def another_operation(backend: RawBackend) -> None:
    """Answer as if something else had been asked."""
    await backend.connect()
    request = await backend.request()
    backend.respond(Response(request.id, Op.DISCARD))


async def more_answers_than_requests(backend: RawBackend) -> None:
    """Move the producer's index beyond the ring."""
    await backend.connect()
    await backend.request()
    backend.mapping.view.cast("I")[2] = 4000
    backend.port.notify()


async def an_error(backend: RawBackend) -> None:
    """Fail a request, which is no lie: the user has to hear of it."""
    await backend.connect()
    backend.answer(await backend.request(), Status.ERROR)
    await serve(backend)


async def a_status_that_nobody_knows(backend: RawBackend) -> None:
    """Answer with a number that blkif.h does not have."""
    await backend.connect()
    backend.answer(await backend.request(), 32767)
    await serve(backend)


async def gone_in_the_middle(backend: RawBackend) -> None:
    """Close the disk for good while a request waits."""
    await backend.connect()
    await backend.request()
    await backend.write({"online": "0", "state": "5"})
    await backend.write({"state": "6"})


LIES = (
    garbage_for_a_size, an_answer_to_nothing, another_operation, more_answers_than_requests,
    an_error, a_status_that_nobody_knows, gone_in_the_middle,
)  # fmt: skip


async def our_driver(directory: str, domid: int, vdev: str) -> int:
    """Write, read and compare by xvd's own frontend; the exit status of a program."""
    try:
        disk = await Disk.connect(directory, domid=domid, vdev=vdev)
        try:
            await disk.write(4096, b"written" * 100)
            return 0 if await disk.read(4096, 700) == b"written" * 100 else 1
        finally:
            await disk.close(timeout_s=1)
    except (OSError, XvdError):
        return 1


def program(command: list[str]) -> Driver:
    """Return a driver that is a program."""

    async def run(directory: str, domid: int, vdev: str) -> int:
        process = await asyncio.create_subprocess_exec(
            *command, directory, str(domid), vdev, stderr=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        try:
            return await process.wait()
        except asyncio.CancelledError:
            process.kill()
            await process.wait()
            raise

    return run


class Case(NamedTuple):
    """A backend, and whether the driver is to succeed with it."""

    backend: Callable[[RawBackend], Awaitable[None]]
    succeeds: bool


async def outcome(case: Case, driver: Driver) -> str:
    """What became of the driver; empty if it did as it should."""
    with tempfile.TemporaryDirectory() as directory:
        async with raw_backend(directory) as backend:
            lying = asyncio.ensure_future(case.backend(backend))
            try:
                async with asyncio.timeout(SECONDS):
                    status = await driver(directory, 1, "xvda")
            except TimeoutError:
                return "HANGS"
            finally:
                lying.cancel()
                await asyncio.gather(lying, return_exceptions=True)
    if status < 0:
        return f"CRASHES, signal {-status}"
    if (status == 0) != case.succeeds:
        return "DOES NOT NOTICE" if status == 0 else f"FAILS, status {status}"
    return ""


async def main(command: list[str]) -> int:
    """Try them all."""
    if command and shutil.which(command[0]) is None:
        print(f"lying_backend: there is no program {command[0]}", file=sys.stderr)
        return 2
    driver = program(command) if command else our_driver
    bad = 0
    for case in [Case(honest, True), *(Case(lie, False) for lie in LIES)]:
        wrong = await outcome(case, driver)
        bad += bool(wrong)
        print(f"{case.backend.__name__.replace('_', ' '):30}{wrong or 'well'}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1:])))
