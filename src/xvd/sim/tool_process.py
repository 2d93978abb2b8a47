# SPDX-License-Identifier: Apache-2.0
"""The toolstack of the simulated machine, and what it can see in the store."""

import asyncio
import contextlib

from xvd.blkif.handshake import stays_online
from xvd.errors import PeerClosed, XvdError
from xvd.machine.emulated.host import Host
from xvd.machine.emulated.xenstore import XenstoreStore
from xvd.machine.xs.client import XenstoreClient
from xvd.machine.xs.messages import Message, MessageType, split_strings
from xvd.sim.clock import Clock
from xvd.sim.process import Process
from xvd.sim.storage import MISSING
from xvd.toolstack.vbd import (
    Vbd,
    attach,
    backend_error,
    create_guest,
    destroy_guest,
    detach,
)
from xvd.toolstack.xldisk import XlDisk
from xvd.types import DOM0, Domid

GUEST = Domid(1)
VBD = Vbd(GUEST, 51712)
PATH = f"device/vbd/{VBD.vdev}"
_TIMEOUT_S = 20.0


class ToolProcess(Process):
    """Does one thing at a time; it begins with the guest and its disk."""

    def __init__(self, host: Host, store: XenstoreStore, clock: Clock, domid: Domid) -> None:
        super().__init__(host, store, clock, domid)
        self.attaching = 0
        """How often it has begun to attach the disk."""
        self.refusal = ""
        """What it was told when a backend refused the last time."""
        self.image = ""
        """What the disk is attached with."""
        self.removed = False
        """Whether the disk was taken away, and no other was attached since."""
        self._client: XenstoreClient | None = None
        self._work: asyncio.Task[None] = self.spawn(self._begin())

    @property
    def idle(self) -> bool:
        """Whether what was wished for is done, or has failed."""
        return self._work.done()

    def wish(self, what: str) -> None:
        """Have it done: "attach", "detach", "force", "destroy" or "build". Only when idle."""
        self._work = self.spawn(getattr(self, f"_{what}")())

    async def _begin(self) -> None:
        self._client = await self.machine.xenstore()
        await self._build()

    async def _build(self) -> None:
        assert self._client is not None
        await create_guest(self._client, GUEST, "guest")
        await self._attach()

    async def _destroy(self) -> None:
        """Remove what is left in the store of a domain that is gone."""
        assert self._client is not None
        await self._detach(force=True)
        await destroy_guest(self._client, GUEST)

    async def _attach(self) -> None:
        assert self._client is not None
        self.attaching += 1
        self.refusal = ""
        self.removed = False
        try:
            disk = XlDisk(target=self.image, vdev="xvda")
            await attach(self._client, GUEST, disk, timeout_s=_TIMEOUT_S)
        except PeerClosed as error:
            if "no backend has taken" not in str(error):
                self.refusal = str(error)
        except XvdError:
            return

    async def _ensure(self) -> None:
        """The guest has the disk, also where a detach was begun that no backend answered, or a
        backend had no storage for it."""
        assert self._client is not None
        online = await self._client.try_read(f"{VBD.backend}/online")
        leaving = online is not None and not stays_online(online)
        if leaving or MISSING in await backend_error(self._client, VBD):
            await self._detach(force=True)
        await self._attach()

    async def _detach(self, *, force: bool = False) -> None:
        assert self._client is not None
        with contextlib.suppress(XvdError):
            await detach(self._client, VBD, force=force, timeout_s=_TIMEOUT_S)
            self.removed = True

    async def _force(self) -> None:
        await self._detach(force=True)

    # ---- Looking from outside ----

    def states(self) -> tuple[str, str]:
        """Return what the two state nodes say: the backend's and the frontend's."""
        texts = [_ask(self._store, MessageType.READ, f"{each}/state") for each in _DIRECTORIES]
        return texts[0].decode(), texts[1].decode()

    def left(self) -> list[str]:
        """Which of a disk's directories there are, what a backend reported of it included."""
        return [path for path in _EVERYTHING if _ask(self._store, MessageType.GET_PERMS, path)]

    def errors(self) -> list[str]:
        """List what the drivers of both domains have reported and nobody removed."""
        return [
            text
            for domid in (DOM0, GUEST)
            for text in _texts(self._store, f"/local/domain/{domid}/error")
        ]

    def lose_guest(self) -> None:
        """Remove the guest's own directory at once, as a toolstack elsewhere does."""
        _ask(self._store, MessageType.RM, f"/local/domain/{GUEST}")


_DIRECTORIES = (VBD.backend, VBD.frontend)
_EVERYTHING = (
    *_DIRECTORIES,
    VBD.private,
    f"/local/domain/{DOM0}/error/backend/vbd/{GUEST}/{VBD.vdev}",
)


def _ask(store: XenstoreStore, message_type: MessageType, path: str) -> bytes:
    """A request of domain 0 that takes no time; empty for what is not there."""
    answers: list[Message] = []
    connection = store.connect(DOM0, answers.append, lambda: None)
    connection.handle(Message(message_type, 1, 0, path.encode() + b"\0"))
    connection.close()
    return b"" if answers[0].type == MessageType.ERROR else answers[0].payload


def _texts(store: XenstoreStore, path: str) -> list[str]:
    children = split_strings(_ask(store, MessageType.DIRECTORY, path))
    own = _ask(store, MessageType.READ, path).decode()
    return [own] * bool(own) + [
        t for name in children for t in _texts(store, f"{path}/{name.decode()}")
    ]
