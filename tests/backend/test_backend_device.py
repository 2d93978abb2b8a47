# SPDX-License-Identifier: Apache-2.0
"""What a backend publishes of its storage, and what it counts over a disk's connections."""

import pytest
from rig_disk import disk_world, opener, run, until
from rig_engines import ByHand
from rig_guest import RawFrontend, backend_reaches
from rig_queue import rq

from xvd.backend.negotiation import features_of
from xvd.backend.settings import Settings
from xvd.blkif.abi import InfoFlag, Op
from xvd.blkif.assignment import BackendAssignment, parse_backend_assignment
from xvd.blkif.features import BackendFeatures, offered_operations
from xvd.blkif.messages import IndirectRequest, Segment, pack_segments
from xvd.engines.interface import Engine, EngineInfo
from xvd.engines.uri import open_engine
from xvd.types import RequestId

TOOLSTACK = {
    "frontend": "/local/domain/1/device/vbd/51712", "frontend-id": "1", "params": "memory:1M",
    "mode": "w", "online": "1",
}  # fmt: skip


@pytest.mark.parametrize(
    ("nodes", "uri", "wanted"),
    [
        ({}, "memory:1M", {"sectors": 2048, "info": 0, "flush": True, "discard": True}),
        ({"discard-enable": "0"}, "memory:1M", {"discard": False}),
        (
            {"device-type": "cdrom"},
            "memory:1M",
            {"info": InfoFlag.CDROM | InfoFlag.REMOVABLE | InfoFlag.READONLY, "discard": False},
        ),
        ({"mode": "r"}, "memory:1M", {"info": InfoFlag.READONLY, "discard": False}),
    ],
)
def test_features_are_the_storages_and_the_toolstacks(
    nodes: dict[str, str], uri: str, wanted: dict[str, object]
) -> None:
    assignment = parse_backend_assignment(TOOLSTACK | nodes)
    engine = open_engine(uri, read_only=not assignment.writable)
    features = features_of(engine, assignment, Settings())
    assert {name: getattr(features, name) for name in wanted} == wanted


@pytest.mark.parametrize("number", range(8))
def test_a_queue_is_offered_what_the_frontend_was_told(number: int) -> None:
    flush, discard, secure = number & 1, number & 2, number & 4
    features = BackendFeatures(
        8, flush=bool(flush), discard=bool(discard), discard_secure=bool(secure)
    )
    bits = offered_operations(features)
    assert bits == 3 | bool(flush) << Op.FLUSH_DISKCACHE | bool(discard) << Op.DISCARD | (
        bool(secure) << 16
    )


@pytest.mark.parametrize(("copying", "mode"), [(False, "mapping"), (True, "grant copy")])
def test_counters_outlive_a_connection(copying: bool, mode: str) -> None:
    async def work() -> None:
        async with disk_world(settings=Settings(copying=copying)) as world:
            vbd = await world.attach()
            for _ in range(2):
                async with await world.open(vbd) as disk:
                    await disk.write(0, bytes(4096))
            assert world.server is not None
            [device] = world.server.devices.values()
            await until(lambda: device.disk.connection is None)
            assert device.disk.mode == mode
            assert device.disk.counters().wr_req == 2
            assert device.disk.counters().copied == (2 if copying else 0)

    run(work())


def test_what_the_storage_cannot_do_is_withdrawn_while_connected() -> None:
    async def work() -> None:
        async with disk_world("error:one_in=1,on=flush,errno=EOPNOTSUPP") as world:
            vbd = await world.attach()
            machine, store = await world.guest()
            frontend = RawFrontend(machine, store, vbd)
            await frontend.publish()
            await backend_reaches(world, vbd, 4)
            before = await world.store.read(f"{vbd.backend}/feature-flush-cache")
            answer = await frontend.ask(rq(Op.FLUSH_DISKCACHE))
            watch = await world.store.watch(f"{vbd.backend}/feature-flush-cache")
            async for _ in watch:
                if await world.store.read(f"{vbd.backend}/feature-flush-cache") == "0":
                    break
            nodes = [
                await world.store.read(f"{vbd.backend}/{n}") for n in ("feature-barrier", "state")
            ]
            assert (before, answer.status, nodes) == ("1", -2, ["1", "4"])
            await watch.close()
            frontend.close()

    run(work())


def test_what_a_restarted_backend_finds_on_the_ring_is_served_once() -> None:
    """The frontend writes to the ring while nobody serves it, and is told by an event."""

    async def work() -> None:
        async with disk_world() as world:
            vbd = await world.attach("null:8M")
            machine, store = await world.guest()
            frontend = RawFrontend(machine, store, vbd)
            await frontend.publish()
            await backend_reaches(world, vbd, 4)
            assert world.server is not None
            await world.server.close()
            assert world.host.host.accounting()["mappings"] == 0
            asking = frontend.ask(rq(Op.READ, 0, Segment(frontend.pages.grefs[0])))
            await world.serve(opener())
            assert (await asking).status == 0
            assert frontend.ring.outstanding() == 0
            frontend.close()

    run(work())


def test_a_server_that_is_closed_leaves_the_nodes_for_the_next() -> None:
    async def work() -> None:
        async with disk_world() as world:
            vbd = await world.attach()
            assert world.server is not None
            await world.server.close()
            assert await world.store.read(f"{vbd.backend}/state") == "2"
            await world.serve(opener())
            async with await world.open(vbd) as disk:
                await disk.write(0, b"x")

    run(work())


def test_a_frontend_is_offered_as_many_indirect_segments_as_are_set() -> None:
    async def work() -> None:
        async with disk_world(settings=Settings(max_indirect_segments=64)) as world:
            vbd = await world.attach()
            await backend_reaches(world, vbd, 2)
            published = await world.store.read(f"{vbd.backend}/feature-max-indirect-segments")
            assert published == "64"

    run(work())


def test_a_guest_sends_an_indirect_request() -> None:
    async def work() -> None:
        async with disk_world() as world:
            vbd = await world.attach()
            machine, store = await world.guest()
            frontend = RawFrontend(machine, store, vbd)
            await frontend.publish()
            await backend_reaches(world, vbd, 4)
            frontend.pages.view[:96] = pack_segments([Segment(frontend.pages.grefs[1])] * 12)
            grefs = (frontend.pages.grefs[0],)
            answer = await frontend.ask(IndirectRequest(Op.READ, RequestId(5), 0, 12, grefs))
            assert (answer.id, answer.operation, answer.status) == (5, Op.READ, 0)
            frontend.close()

    run(work())


def test_a_successor_that_would_offer_less_keeps_what_was_promised() -> None:
    """The frontend goes on sending what the backend before this one told it to."""

    async def work() -> None:
        async with disk_world() as world:
            vbd = await world.attach("null:8M")
            machine, store = await world.guest()
            frontend = RawFrontend(machine, store, vbd)
            await frontend.publish()
            await backend_reaches(world, vbd, 4)
            assert world.server is not None
            await world.server.close()
            await world.serve(opener(), Settings(max_indirect_segments=0))
            frontend.pages.view[:96] = pack_segments([Segment(frontend.pages.grefs[1])] * 12)
            grefs = (frontend.pages.grefs[0],)
            answer = await frontend.ask(IndirectRequest(Op.READ, RequestId(5), 0, 12, grefs))
            assert answer.status == 0
            frontend.close()
            await store.write(f"{vbd.frontend}/state", "6")
            await backend_reaches(world, vbd, 6)
            await store.write(f"{vbd.frontend}/state", "1")
            await backend_reaches(world, vbd, 2)
            published = await world.store.read(f"{vbd.backend}/feature-max-indirect-segments")
            assert published == "0"

    run(work())


@pytest.mark.beyond_xen("mapping")
@pytest.mark.parametrize(
    ("ours", "theirs", "copying", "mode"),
    [
        (True, "1", False, "persistent grants"),
        (True, "0", False, "mapping"),
        (True, None, False, "mapping"),
        (False, "1", False, "mapping"),
        (True, "1", True, "grant copy"),
    ],
)
def test_grants_stay_mapped_when_both_ends_say_so(
    ours: bool, theirs: str | None, copying: bool, mode: str
) -> None:
    """What is published follows the setting only; what was negotiated is kept apart (06ba5d2e)."""

    async def work() -> None:
        settings = Settings(feature_persistent=ours, copying=copying)
        async with disk_world(settings=settings) as world:
            vbd = await world.attach()
            machine, store = await world.guest()
            frontend = RawFrontend(machine, store, vbd)
            await frontend.publish({"feature-persistent": theirs})
            await backend_reaches(world, vbd, 4)
            published = await world.store.read(f"{vbd.backend}/feature-persistent")
            await frontend.ask(rq(Op.READ, 0, Segment(frontend.pages.grefs[0])))
            assert world.server is not None
            [device] = world.server.devices.values()
            assert device.disk.mode == mode
            assert published == str(int(ours and not copying))
            assert frontend.pages.revoke(0) == (mode != "persistent grants")
            await store.write(f"{vbd.frontend}/state", "6")
            await backend_reaches(world, vbd, 6)
            assert world.host.host.accounting()["mappings"] == 0
            frontend.close()

    run(work())


@pytest.mark.parametrize(("scaled", "kept"), [(False, 3), (True, 4)])
def test_the_limit_is_a_rings_or_a_ring_pages(scaled: bool, kept: int) -> None:
    async def work() -> None:
        settings = Settings(max_persistent_grants=3, scale_persistent_grants=scaled)
        async with disk_world(settings=settings) as world:
            vbd = await world.attach()
            machine, store = await world.guest()
            frontend = RawFrontend(machine, store, vbd, order=1)
            await frontend.publish({"feature-persistent": "1"})
            await backend_reaches(world, vbd, 4)
            await frontend.ask(rq(Op.READ, 0, *map(Segment, frontend.pages.grefs)))
            assert world.server is not None
            [device] = world.server.devices.values()
            assert device.disk.counters().persistent_grants == kept
            frontend.close()

    run(work())


class CanDiscard(ByHand):
    """Storage that discards in units of its own."""

    def __init__(self, erases: bool) -> None:
        super().__init__(1 << 20)
        self.erases = erases

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            size=1 << 20, can_discard=True, can_secure_discard=self.erases,
            discard_granularity=65536, discard_alignment=512,
        )  # fmt: skip


@pytest.mark.parametrize(("erases", "offered"), [(True, "1"), (False, "0")])
def test_discard_is_published_as_the_storage_has_it(erases: bool, offered: str) -> None:
    async def open_storage(_: BackendAssignment) -> Engine:
        return CanDiscard(erases)

    async def work() -> None:
        async with disk_world(open_storage=open_storage) as world:
            vbd = await world.attach()
            machine, store = await world.guest()
            frontend = RawFrontend(machine, store, vbd)
            await frontend.publish()
            await backend_reaches(world, vbd, 4)
            wanted = {
                "feature-discard": "1", "discard-granularity": "65536", "discard-alignment": "512",
                "discard-secure": offered,
            }  # fmt: skip
            assert {n: await world.store.read(f"{vbd.backend}/{n}") for n in wanted} == wanted
            frontend.close()

    run(work())


def test_every_message_says_which_disk_it_is_about(caplog: pytest.LogCaptureFixture) -> None:
    """Linux 77387b82."""
    caplog.set_level("DEBUG", "xvd.backend.device")

    async def work() -> None:
        async with disk_world() as world:
            for domid, vdev in ((1, "xvda"), (2, "xvdb")):
                async with await world.disk(domid=domid, vdev=vdev) as disk:
                    await disk.write(0, b"x")

    run(work())
    prefixes = {message.partition(": ")[0] for message in caplog.messages}
    assert prefixes == {"1/xvda", "2/xvdb"}
