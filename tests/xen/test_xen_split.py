# SPDX-License-Identifier: Apache-2.0
"""Linux with pages of 64 KiB at the ring: without indirect requests each page is two linked ones.

The backend is the readable one (tests/support/rig_backend.py), so that a test sees each request and
chooses how it is answered; the guest is Linux 6.1 on ARM64: `make xen SUITE=arm64`.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from rig_backend import RICH, ModelBackend
from xen_host import ON_ARM, domu, sh, typed

from xvd.blkif.abi import Op, Status
from xvd.blkif.messages import Request
from xvd.machine.xen.machine import XenMachine
from xvd.toolstack.vbd import add, remove_nodes, wait_for_state
from xvd.toolstack.xldisk import parse_xl_disk
from xvd.types import Domid

pytestmark = pytest.mark.skipif(not ON_ARM, reason="Linux on x86 has pages of 4 KiB only")

SEGMENTED = replace(RICH, max_indirect_segments=0, max_queues=1)
"""What a request has room for is the eleven segments of its slot."""

CHUNK = 64 << 10
CHUNKS = 32
WRITE = f"dd if=/tmp/data of=/dev/xvda bs={CHUNK} count={CHUNKS} oflag=direct 2>&1"
READ = f"dd if=/dev/xvda bs={CHUNK} count={CHUNKS} iflag=direct 2> /dev/null | md5sum"


class Backend(ModelBackend):
    """Fails the requests of data that `fails` says. done: in the order of their answers."""

    fails: Callable[[Request], bool] = staticmethod(lambda request: False)

    def __init__(self, *words: Any) -> None:
        super().__init__(*words)
        self.done: list[Any] = []

    def _do(self, request: Any) -> int:
        self.done.append(request)
        if isinstance(request, Request) and self.fails(request):
            return Status.ERROR
        return super()._do(request)


@pytest.fixture(scope="module")
def domid() -> Iterator[int]:
    """A guest without disks, which stays."""
    domu("-n", "u1", "-K", "64k-6.1", "-b")
    typed("u1", "dmesg -n 1")  # its complaints would be on the console, among what is said there
    typed("u1", f"dd if=/dev/urandom of=/tmp/data bs={CHUNK} count={CHUNKS} 2>&1")
    number = int(sh("xl domid u1"))
    yield number
    sh("xl destroy u1")
    sh(f"xenstore-rm /local/domain/0/backend/vbd/{number}")  # xl knows nothing of its disks


@asynccontextmanager
async def served(domid: int, persistent: bool) -> AsyncIterator[Backend]:
    """The guest has a disk of 4 MiB; nothing of it is left afterwards."""
    machine = await XenMachine.here()
    store = await machine.xenstore()
    world: Any = SimpleNamespace(store=store, dom0=machine)
    vbd = await add(store, Domid(domid), parse_xl_disk("vdev=xvda,target=memory:4M"), Domid(0))
    backend = Backend(world, vbd, replace(SEGMENTED, persistent=persistent))
    try:
        await backend.connect()
        await guest("n=0; until [ -b /dev/xvda ] || [ $n -gt 100 ]; do sleep .1; n=$((n+1)); done")
        yield backend
    finally:
        await store.write(f"{vbd.backend}/state", "5")
        await wait_for_state(store, vbd.frontend, lambda state: state == 6, 30)
        await backend.close()
        await remove_nodes(store, vbd)
        await guest("n=0; while [ -b /dev/xvda ] && [ $n -lt 100 ]; do sleep .1; n=$((n+1)); done")
        await store.close()
        machine.close()


async def guest(command: str) -> str:
    """The backend serves meanwhile."""
    return await asyncio.to_thread(typed, "u1", command)


def last(requests: list[Any], operation: Op) -> list[Request]:
    """Those of all chunks, without what the kernel has read of its own accord before."""
    found = [r for r in requests if isinstance(r, Request) and r.operation == operation]
    return found[-2 * CHUNKS :]


def halves(requests: list[Request]) -> list[tuple[int, int]]:
    """(sector, segments) of each."""
    return [(request.sector_number, len(request.segments)) for request in requests]


@pytest.mark.parametrize("newest_first", [False, True], ids=["in order", "newest first"])
@pytest.mark.parametrize("persistent", [False, True], ids=["copied", "persistent"])
def test_a_page_is_two_requests_which_may_be_answered_in_either_order(
    domid: int, persistent: bool, newest_first: bool
) -> None:
    async def scenario() -> tuple[Backend, str, str]:
        async with served(domid, persistent) as backend:
            backend.newest_first = newest_first
            await guest(WRITE)
            seen = await guest(READ)
            return backend, seen, await guest("md5sum < /tmp/data")

    backend, seen, wanted = asyncio.run(scenario())
    order = reversed if newest_first else list
    pairs = [[(chunk * 128, 11), (chunk * 128 + 88, 5)] for chunk in range(CHUNKS)]
    for operation in (Op.WRITE, Op.READ):
        assert halves(last(backend.seen, operation)) == [h for pair in pairs for h in pair]
        assert halves(last(backend.done, operation)) == [h for pair in pairs for h in order(pair)]
    assert seen == wanted
    assert wanted.split()[0] == hashlib.md5(backend.storage[: CHUNKS * CHUNK]).hexdigest()


@pytest.mark.parametrize("newest_first", [False, True], ids=["in order", "newest first"])
@pytest.mark.parametrize("segments", [11, 5], ids=["first half", "second half"])
@pytest.mark.parametrize(
    ("operation", "files"),
    [
        (Op.READ, "if=/dev/xvda of=/dev/null iflag=direct skip=$i"),
        (Op.WRITE, "if=/dev/zero of=/dev/xvda oflag=direct seek=$i"),
    ],
    ids=["read", "write"],
)
def test_a_page_fails_with_either_of_its_halves(
    domid: int, operation: Op, files: str, segments: int, newest_first: bool
) -> None:
    """One half of every second page fails; the other half is answered well."""

    def fails(request: Request) -> bool:
        odd = request.sector_number // 128 % 2 == 1
        return odd and request.operation == operation and len(request.segments) == segments

    async def scenario() -> str:
        async with served(domid, persistent=True) as backend:
            backend.newest_first = newest_first
            backend.fails = fails
            step = f"dd {files} bs={CHUNK} count=1 2> /dev/null && echo whole || echo failed"
            return await guest(f"i=0; while [ $i -lt {CHUNKS} ]; do {step}; i=$((i+1)); done")

    said = asyncio.run(scenario())
    assert said.split() == ["whole", "failed"] * (CHUNKS // 2)
