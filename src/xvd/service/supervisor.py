# SPDX-License-Identifier: Apache-2.0
"""A process for each guest: the supervisor keeps a worker for each guest that has disks.

A guest is the boundary of trust. Whatever becomes of its worker costs that guest a delay: another
takes its rings up (backend/state.py). A guest that migrates within its host is two domains for a
while, and has one worker: both have the same disks.
"""

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from xvd.errors import PeerClosed, XenstoreError, describe
from xvd.loglimit import LogLimit
from xvd.machine.xs.client import Watch, XenstoreClient
from xvd.service.template import Template, Worker
from xvd.types import Domid

logger = logging.getLogger(__name__)

LINGER_S: Final = 5.0
"""How long a worker without a disk is kept: one that is attached again finds it warm."""
LIVED_S: Final = 0.2
"""A worker that ends sooner is followed by another after a pause, longer each time."""
PAUSE_S: Final = 0.05
PAUSE_MAX_S: Final = 30.0

_ENDED: Final = "the worker of domain %s has ended after %.1f s; another takes over"

Order = Callable[[Sequence[int]], Any]
"""Makes the order of a worker for a guest's domains; see `Template.spawn`."""


@dataclass(slots=True, eq=False)
class _Guest:
    """A guest with disks. key: what tells it from others: its ``vm`` node, or its number. told:
    the domains that its worker knows of, those that it had before included."""

    key: str
    domains: list[int]
    told: set[int] = field(default_factory=set)
    worker: Worker | None = None
    task: "asyncio.Task[None] | None" = None
    restarts: int = 0
    limit: LogLimit = field(default_factory=lambda: LogLimit(None))
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def wanted(self) -> bool:
        """Whether it still has a disk."""
        return bool(self.domains)


class Supervisor:
    """Keeps a worker for each guest that has a disk under ``backend/<kind>`` of this domain.

    order: what a worker is told to do. A worker is told of a further domain of its guest by a line
    with its number. clear: removes what killed workers have left, except of these domains;
    it is called at the start, and when a guest has no worker any more. For the event loop's thread.
    """

    def __init__(
        self,
        store: XenstoreClient,
        template: Template,
        kinds: Sequence[str],
        order: Order,
        clear: Callable[[Collection[int]], None],
    ) -> None:
        self._store = store
        self._template = template
        self._kinds = kinds
        self._order = order
        self._clear = clear
        self._guests: dict[str, _Guest] = {}
        self._watches: list[Watch] = []
        self._followers: list[asyncio.Task[None]] = []
        self._turn = asyncio.Lock()
        self._closing = False

    async def start(self) -> None:
        """Watch, and have served what is assigned already."""
        self._clear([domain for guest in self._guests.values() for domain in guest.domains])
        for kind in self._kinds:
            watch = await self._store.watch(f"backend/{kind}")
            self._watches.append(watch)
            self._followers.append(asyncio.create_task(self._follow(kind, watch)))

    async def wait(self) -> str:
        """Return when there can be no more workers: what is lost, and the remedy."""
        store = asyncio.ensure_future(asyncio.wait(self._followers))
        template = asyncio.ensure_future(self._template.wait())
        try:
            await asyncio.wait((store, template), return_when=asyncio.FIRST_COMPLETED)
            if template.done():
                return "the process that forks workers has ended; start the backend again"
            return "the host's xenstore is gone; start it, then this again"
        finally:
            store.cancel()
            template.cancel()

    def workers(self) -> list[dict[str, Any]]:
        """Tell of each worker: its guest's domains, its number, and how many there were before."""
        return [
            {
                "domains": guest.domains,
                "pid": guest.worker.pid if guest.worker else None,
                "restarts": guest.restarts,
            }
            for guest in self._guests.values()
        ]

    async def close(self) -> None:
        """End every worker; the disks stay as they are, for whoever serves them next."""
        self._closing = True
        for task in self._followers:
            task.cancel()
        await asyncio.gather(*self._followers, return_exceptions=True)
        for watch in self._watches:
            with contextlib.suppress(PeerClosed, XenstoreError):
                await watch.close()
        keepers = [guest.task for guest in self._guests.values() if guest.task is not None]
        for guest in self._guests.values():
            guest.domains.clear()
            guest.changed.set()
        await asyncio.gather(*keepers, return_exceptions=True)
        self._template.close()

    # ---- Who has disks ----

    async def _follow(self, kind: str, watch: Watch) -> None:
        with contextlib.suppress(PeerClosed):
            async for path in watch:
                parts = path.removeprefix(f"backend/{kind}").strip("/").split("/")
                names = [parts[0]] if parts[0] else await self._children(f"backend/{kind}")
                for name in names:
                    if name.isdigit():
                        await self._consider(int(name))

    async def _children(self, path: str) -> list[str]:
        try:
            return await self._store.ls(path)
        except XenstoreError:
            return []

    async def _consider(self, domain: int) -> None:
        """Have a domain's disks served, if it has any, or no more."""
        async with self._turn:
            has = [await self._children(f"backend/{kind}/{domain}") for kind in self._kinds]
            known = next((g for g in self._guests.values() if domain in g.domains), None)
            if any(has) == (known is not None) or self._closing:
                return
            if known is not None:
                known.domains.remove(domain)
                known.changed.set()
                return
            await self._add(domain)

    async def _add(self, domain: int) -> None:
        key = str(domain)
        with contextlib.suppress(XenstoreError):
            key = await self._store.try_read(f"/local/domain/{domain}/vm") or key
        for other in self._guests.values():
            if domain in other.told and other.key != key and other.worker is not None:
                other.worker.signal(signal.SIGTERM)  # it would serve the number's new guest too
        guest = self._guests.get(key)
        if guest is None:
            guest = self._guests[key] = _Guest(key, [domain], limit=LogLimit(Domid(domain)))
            guest.task = asyncio.create_task(self._keep(guest))
            return
        guest.domains.append(domain)
        guest.changed.set()
        if guest.worker is not None and domain not in guest.told:
            guest.told.add(domain)
            with contextlib.suppress(OSError):  # it ends, and its successor is told all of them
                guest.worker.channel.send(b"%d\n" % domain)

    # ---- Its worker ----

    async def _keep(self, guest: _Guest) -> None:
        """Let a guest have a worker for as long as it has disks."""
        pause_s = PAUSE_S
        while guest.wanted:
            began = time.monotonic()
            guest.told = set(guest.domains)
            try:
                guest.worker = await self._template.spawn(self._order(guest.domains))
            except (OSError, PeerClosed) as error:
                logger.error("no worker for domain %s: %s", guest.domains[0], describe(error))
            else:
                await self._until_over(guest, guest.worker)
                guest.worker = None
                if not guest.wanted or self._closing:
                    break
                guest.restarts += 1
                if guest.limit.admit(logger, logging.ERROR, _ENDED):  # a guest may be the cause
                    domains = ", ".join(map(str, guest.domains))
                    logger.error(_ENDED, domains, time.monotonic() - began)
            if time.monotonic() - began >= LIVED_S:
                pause_s = PAUSE_S
            else:
                await self._pause(guest, pause_s)
                pause_s = min(2 * pause_s, PAUSE_MAX_S)
        if self._guests.get(guest.key) is guest:
            del self._guests[guest.key]
        self._clear([domain for guest in self._guests.values() for domain in guest.domains])

    async def _pause(self, guest: _Guest, seconds: float) -> None:
        """Let time pass, unless something changes: a disk more or less, or the end of all."""
        guest.changed.clear()
        if guest.wanted and not self._closing:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await guest.changed.wait()

    async def _until_over(self, guest: _Guest, worker: Worker) -> None:
        """Wait until a worker has ended, by itself or as its guest has had no disk for long."""
        while not worker.ended.done():
            guest.changed.clear()
            changed = asyncio.ensure_future(guest.changed.wait())
            try:
                timeout = None if guest.wanted else 0.0 if self._closing else LINGER_S
                done, _ = await asyncio.wait(
                    (changed, worker.ended), timeout=timeout,
                    return_when=asyncio.FIRST_COMPLETED,
                )  # fmt: skip
            finally:
                changed.cancel()
            if not done:
                if not self._closing and self._guests.get(guest.key) is guest:
                    del self._guests[guest.key]  # a disk that comes now gets another worker
                worker.signal(signal.SIGTERM)
                await worker.ended
