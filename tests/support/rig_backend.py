# SPDX-License-Identifier: Apache-2.0
"""A whole backend in Python, after the model of blkif/: it has every feature, or as few as asked.

It is honest, slow and readable: it takes requests, judges them with `validate`, moves data by the
kept or the fleeting mapping, and answers in the order it likes. Tests of the frontend choose what
it offers, what it refuses, and look at what it was sent.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from rig_disk import World

from xvd.blkif.abi import SEGMENTS_PER_INDIRECT_PAGE, Abi, Op, Status
from xvd.blkif.features import BackendFeatures, format_backend, format_offer, format_size
from xvd.blkif.messages import (
    AnyRequest,
    DiscardRequest,
    IndirectRequest,
    Request,
    Segment,
    unpack_request,
    unpack_segments,
)
from xvd.blkif.nodes import FrontendConfig, NodeChanges, parse_frontend
from xvd.blkif.ring import BackRing, Outcome
from xvd.blkif.validate import Limits, Refusal, answer, validate
from xvd.frontend.disk import Disk
from xvd.frontend.settings import Settings
from xvd.machine.interface import EventChannel, ForeignGrants, Machine, Mapping
from xvd.toolstack.vbd import Vbd, add, wait_for_state
from xvd.toolstack.xldisk import parse_xl_disk
from xvd.types import Domid, Gref
from xvd.xenbus.directory import change_device, read_directory

SECTOR = 512
RICH = BackendFeatures(
    sectors=8192,
    flush=True,
    barrier=True,
    discard=True,
    discard_granularity=512,
    discard_secure=True,
    persistent=True,
    max_indirect_segments=256,
    max_ring_page_order=6,
    max_queues=4,
)
"""Everything that blkif knows, on 4 MiB."""
BARE = BackendFeatures(sectors=8192, flush=False)
"""Nothing but reads and writes."""


@dataclass
class _Ring:
    ring: BackRing
    mapping: Mapping
    port: EventChannel
    taken: list[AnyRequest] = field(default_factory=list)
    held: list[AnyRequest] = field(default_factory=list)


class ModelBackend:
    """One disk's backend, in domain 0 unless another `machine` is given.

    refuse: a status for an operation, instead of doing it. seen: every request in the order taken;
    `rings` has them by queue. paused: requests are taken and not answered.
    """

    def __init__(
        self,
        world: World,
        vbd: Vbd,
        features: BackendFeatures = RICH,
        machine: Machine | None = None,
    ) -> None:
        self.world = world
        self.machine = machine or world.dom0
        self.vbd = vbd
        self.features = features
        self.storage = bytearray(features.sectors * SECTOR)
        self.refuse: dict[int, int] = {}
        self.seen: list[AnyRequest] = []
        self.paused = False
        self.newest_first = False
        self.rings: list[_Ring] = []
        self.kept: dict[Gref, Mapping] = {}
        self.config: FrontendConfig | None = None
        self._grants: ForeignGrants | None = None
        self._serving: asyncio.Task[None] | None = None

    # ---- The handshake ----

    async def _write(self, changes: NodeChanges, state: int | None = None) -> None:
        await change_device(
            self.world.store, self.vbd.backend, state=state, write=changes.write,
            remove=changes.remove,
        )  # fmt: skip

    async def offer(self) -> None:
        await self._write(format_offer(self.features), 2)

    async def connect(self) -> None:
        """Offer, wait for the frontend, map its rings, publish, and serve."""
        await self.offer()
        await wait_for_state(self.world.store, self.vbd.frontend, lambda s: s == 3, 10)
        nodes = await read_directory(self.world.store, self.vbd.frontend, lambda name: True)
        self.config = parse_frontend(
            nodes, host_abi=Abi.native(), max_queues=self.features.max_queues,
            max_ring_page_order=self.features.max_ring_page_order,
        )  # fmt: skip
        machine = self.machine
        self._grants = machine.grants.foreign(self.vbd.domid)
        for queue in self.config.queues:
            mapping = self._grants.map(queue.ring_refs)
            port = machine.event_channels.bind_interdomain(self.vbd.domid, queue.event_channel)
            ring = BackRing(mapping.view, self.config.abi, self.config.ring_pages).attach()
            self.rings.append(_Ring(ring, mapping, port))
        await self._write(format_backend(self.features), 4)
        self._serving = asyncio.create_task(self._serve())

    async def resize(self, sectors: int) -> None:
        self.features = replace(self.features, sectors=sectors)
        self.storage = (self.storage + bytes(sectors * SECTOR))[: sectors * SECTOR]
        await self._write(format_size(sectors))

    async def close(self) -> None:
        """Let go of everything, whatever is in flight."""
        if self._serving is not None:
            self._serving.cancel()
            [failure] = await asyncio.gather(self._serving, return_exceptions=True)
            assert isinstance(failure, asyncio.CancelledError), f"the backend has failed: {failure}"
            self._serving = None
        for mapping in self.kept.values():
            mapping.close()
        self.kept.clear()
        for ring in self.rings:
            ring.port.close()
            ring.mapping.close()
        self.rings.clear()
        if self._grants is not None:
            self._grants.close()
            self._grants = None

    async def come_back(self, features: BackendFeatures | None = None) -> None:
        """Vanish with what is in flight, and connect as a successor that offers something else."""
        await self.close()
        self.features = features or self.features
        await self.connect()

    # ---- Serving ----

    async def _serve(self) -> None:
        while True:
            for ring in self.rings:
                self._serve_ring(ring)
            await asyncio.sleep(0)

    def _serve_ring(self, ring: _Ring) -> None:
        assert self.config is not None
        while True:
            outcome, slot = ring.ring.take()
            assert outcome is not Outcome.BROKEN
            if outcome is Outcome.EMPTY:
                break
            request = unpack_request(self.config.abi, slot)
            ring.taken.append(request)
            ring.held.append(request)
            self.seen.append(request)
        if self.paused or not ring.held:
            return
        for request in reversed(ring.held) if self.newest_first else ring.held:
            ring.ring.put_response(answer(request, Status(self._do(request))))
        ring.held.clear()
        ring.ring.push()
        ring.port.notify()

    def _do(self, request: AnyRequest) -> int:
        """Carry a request out; its status. An honest frontend is never refused."""
        limits = Limits(
            capacity=self.features.sectors,
            block_sectors=self.features.sector_size // SECTOR,
            flush=self.features.flush, barrier=self.features.barrier,
            discard=self.features.discard, secure_discard=self.features.discard_secure,
            indirect_max=self.features.max_indirect_segments,
        )  # fmt: skip
        segments = self._segments(request)
        operation = operation_of(request)
        if operation in self.refuse:
            return self.refuse[operation]
        found = validate(
            request, limits, segments if isinstance(request, IndirectRequest) else None
        )
        assert found is Refusal.NONE, f"{request} was refused: {found.name}"
        if isinstance(request, DiscardRequest):
            at, size = request.sector_number * SECTOR, request.nr_sectors * SECTOR
            self.storage[at : at + size] = bytes(size)
        elif isinstance(request, Request | IndirectRequest):
            self._move(request.sector_number * SECTOR, segments, operation)
        return 0

    def _segments(self, request: AnyRequest) -> tuple[Segment, ...]:
        if isinstance(request, Request):
            return request.segments
        found: list[Segment] = []
        if isinstance(request, IndirectRequest):
            for gref in request.indirect_grefs:
                here = min(request.nr_segments - len(found), SEGMENTS_PER_INDIRECT_PAGE)
                found += unpack_segments(self._read(gref, 0, here * 8), here)
        return tuple(found)

    def _move(self, at: int, segments: tuple[Segment, ...], operation: int) -> None:
        for segment in segments:
            offset, size = segment.first_sect * SECTOR, segment.sectors * SECTOR
            if operation == Op.READ:
                self._put(segment.gref, offset, bytes(self.storage[at : at + size]))
            else:
                self.storage[at : at + size] = self._read(segment.gref, offset, size)
            at += size

    def _keep(self, gref: Gref) -> memoryview:
        assert self._grants is not None
        if gref not in self.kept:
            self.kept[gref] = self._grants.map([gref])
        return self.kept[gref].view

    @property
    def _keeping(self) -> bool:
        assert self.config is not None
        return self.features.persistent and self.config.persistent

    def _read(self, gref: Gref, offset: int, size: int) -> bytes:
        assert self._grants is not None
        if self._keeping:
            return bytes(self._keep(gref)[offset : offset + size])
        return self._grants.read(gref, offset, size)

    def _put(self, gref: Gref, offset: int, data: bytes) -> None:
        assert self._grants is not None
        if self._keeping:
            self._keep(gref)[offset : offset + len(data)] = data
        else:
            self._grants.write(gref, offset, data)


def operation_of(request: AnyRequest) -> int:
    """What a request does; of an indirect one the inner operation."""
    if isinstance(request, IndirectRequest):
        return request.indirect_op
    return getattr(request, "operation", Op.DISCARD)


@asynccontextmanager
async def model_disk(
    world: World,
    features: BackendFeatures = RICH,
    *,
    nodes: dict[str, str] | None = None,
    **settings: Any,
) -> AsyncIterator[tuple[Disk, ModelBackend]]:
    """A disk of guest 1 on a `ModelBackend`: (disk, backend). The world has no other backend.

    nodes: of the frontend's directory, as the toolstack has written them.
    """
    machine, store = await world.guest(1)
    vbd = await add(world.store, Domid(1), parse_xl_disk("vdev=xvda,target=memory:1M"), Domid(0))
    for name, value in (nodes or {}).items():
        await store.write(f"{vbd.frontend}/{name}", value)
    backend = ModelBackend(world, vbd, features)
    path = f"device/vbd/{vbd.vdev}"
    opening = asyncio.ensure_future(Disk.open(machine, store, path, settings=Settings(**settings)))
    await backend.connect()
    disk = await opening
    try:
        yield disk, backend
    finally:
        await disk._leave(abandon=True)
        await backend.close()
