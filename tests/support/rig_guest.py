# SPDX-License-Identifier: Apache-2.0
"""Test doubles of a whole end: they write the store and the ring directly, and may lie.

`RawFrontend` plays a guest's driver against our backend, `RawBackend` a backend against our disk.
"""

import asyncio

from rig_disk import World, until

from xvd import testing
from xvd.blkif.abi import Abi
from xvd.blkif.messages import AnyRequest, Response
from xvd.blkif.ring import FrontRing, Outcome
from xvd.machine.emulated.machine import EmulatedMachine
from xvd.machine.xs.client import XenstoreClient
from xvd.toolstack.vbd import Vbd, wait_for_state
from xvd.types import Domid

SECONDS = 10.0


async def backend_reaches(world: World, vbd: Vbd, *states: int) -> int:
    return await wait_for_state(world.store, vbd.backend, lambda s: s in states, SECONDS)


async def backend_error(world: World, vbd: Vbd) -> str:
    """What the backend reports, once it has."""
    path = f"/local/domain/0/error/backend/vbd/{vbd.domid}/{vbd.vdev}/error"
    async with asyncio.timeout(10):
        while not (text := await world.store.try_read(path)):  # noqa: ASYNC110
            await asyncio.sleep(0)
    return text


class RawQueue:
    """One ring with its port, and nothing that would stop anybody from writing to it."""

    def __init__(self, machine: EmulatedMachine, peer: Domid, pages: int = 1) -> None:
        self.ring_pages = machine.grants.share(peer, pages)
        self.port = machine.event_channels.alloc_unbound(peer)
        self.ring = FrontRing(self.ring_pages.view, Abi.X86_64, pages).init()

    def put(self, *requests: AnyRequest) -> None:
        for request in requests:
            self.ring.put_request(request)
        self.ring.push()
        self.port.notify()

    async def answers(self, count: int) -> list[Response]:
        """Wait for that many responses."""
        found: list[Response] = []

        def answered() -> bool:
            outcome, response = self.ring.take_response()
            assert outcome is not Outcome.BROKEN
            if response is not None:
                found.append(response)
            return len(found) == count

        await until(answered)
        return found

    async def ask(self, request: AnyRequest) -> Response:
        self.put(request)
        [answer] = await self.answers(1)
        return answer

    def nodes(self, prefix: str = "") -> dict[str, str | bytes | None]:
        refs = self.ring_pages.grefs
        numbered = {f"{prefix}ring-ref{page}": str(ref) for page, ref in enumerate(refs)}
        named = {f"{prefix}ring-ref": str(refs[0])}
        port = {f"{prefix}event-channel": str(self.port.port)}
        return {**(numbered if len(refs) > 1 else named), **port}

    def close(self) -> None:
        self.port.close()
        self.ring_pages.close()


class RawFrontend:
    """A frontend without manners. `nodes` overrides what an honest one would publish.

    With several queues, `ring_pages`, `ring` and `port` are those of the first.
    """

    def __init__(
        self,
        machine: EmulatedMachine,
        store: XenstoreClient,
        vbd: Vbd,
        *,
        queues: int = 1,
        order: int = 0,
    ) -> None:
        self.machine = machine
        self.store = store
        self.vbd = vbd
        self.order = order
        self.queues = [RawQueue(machine, vbd.backend_domid, 1 << order) for _ in range(queues)]
        self.pages = machine.grants.share(vbd.backend_domid, 4)
        self.ring_pages = self.queues[0].ring_pages
        self.ring = self.queues[0].ring
        self.port = self.queues[0].port
        self.ask = self.queues[0].ask

    async def write(self, nodes: dict[str, str | bytes | None]) -> None:
        for name, value in nodes.items():
            path = f"{self.vbd.frontend}/{name}"
            if value is None:
                if await self.store.exists(path):
                    await self.store.rm(path)
            else:
                await self.store.write(path, value)

    async def publish(
        self, nodes: dict[str, str | bytes | None] | None = None, state: str | bytes = "4"
    ) -> None:
        honest: dict[str, str | bytes | None] = {"protocol": "x86_64-abi"}
        if self.order:
            honest["ring-page-order"] = str(self.order)
        if len(self.queues) > 1:
            honest["multi-queue-num-queues"] = str(len(self.queues))
        for number, queue in enumerate(self.queues):
            honest |= queue.nodes(f"queue-{number}/" if len(self.queues) > 1 else "")
        await self.write(honest | (nodes or {}) | {"state": state})

    def close(self) -> None:
        for queue in self.queues:
            queue.close()
        self.pages.close()


async def connected(
    world: World, target: str = "memory:8M", *, queues: int = 1, order: int = 0
) -> tuple[RawFrontend, Vbd]:
    """A disk attached to guest 1, and a frontend without manners that is connected to it."""
    vbd = await world.attach(target)
    machine, store = await world.guest()
    frontend = RawFrontend(machine, store, vbd, queues=queues, order=order)
    await frontend.publish()
    await backend_reaches(world, vbd, 4)
    return frontend, vbd


class RawBackend(testing.RawBackend):
    """A backend without manners, in domain 0."""

    def __init__(self, world: World, vbd: Vbd) -> None:
        super().__init__(world.dom0, world.store, vbd)
