# SPDX-License-Identifier: Apache-2.0
"""A process for each guest: the supervisor keeps a worker for each guest that has disks.

A guest is the boundary of trust. Whatever becomes of its worker costs that guest a delay: another
takes its rings up (backend/state.py). A guest that migrates within its host is two domains for a
while, and has one worker: both have the same disks. What a worker may reach is settled when it
begins; where that is not enough any more, another one takes its place.
"""

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from xvd.errors import PeerClosed, XenstoreError, XvdError, describe
from xvd.loglimit import LogLimit
from xvd.machine.xs.client import Watch, XenstoreClient
from xvd.service.template import Template, Worker
from xvd.types import Domid
from xvd.xenbus.directory import prune_errors

logger = logging.getLogger(__name__)

LINGER_S: Final = 5.0
"""How long a worker without a disk is kept: one that is attached again finds it warm."""
PING_S: Final = 10.0
"""How often a worker is asked whether its event loop runs; it looks at its disks' sizes then."""
PING_MOST_S: Final = 60.0
"""At most, where there are many."""
PINGS_A_SECOND: Final = 10
"""Of all workers together: idle ones do little else, and each is cold when it does."""
PONG_S: Final = 15.0
"""How long it may take to say so; then it hangs, and is killed."""
PING: Final = b"p"
"""What it is asked by, on its channel, and what it answers."""
END_S: Final = 20.0
"""How long a worker may take to end once it is asked to; then it is killed."""
TIDY_S: Final = 0.05
"""From one look at errors to the next, however many are told."""
AT_ONCE: Final = 100
"""Successors of a guest's workers that begin at once, one after another."""
AGAIN_S: Final = 0.5
"""After so long there may be one more of these."""

_ENDED: Final = "the worker of domain %s has ended after %.1f s; another takes over"
_HANGS: Final = "the worker of domain %s does not answer, and is killed"
_NONE: Final = "no worker for domain %s: %s"

Order = Callable[[Sequence[int]], Any]
"""Makes the order of a worker for a guest's domains; see `Template.spawn`."""


def ping_pause_s(workers: int) -> float:
    """From one question to a worker to the next, among so many."""
    return min(max(PING_S, workers / PINGS_A_SECOND), PING_MOST_S)


class Rights(Protocol):
    """What workers are given beside their order. For the event loop's thread."""

    async def equip(
        self, worker: Worker, guest: str, domains: Sequence[int], limit: LogLimit
    ) -> Callable[[], Awaitable[None]]:
        """Give a new worker of a guest what it is to have. What is returned takes it back, once the
        worker has ended. Raises OSError or `XvdError`."""

    async def suits(self, guest: str, domains: Sequence[int]) -> bool:
        """Whether what the guest's worker has is enough for the disks that it has by now."""

    async def gone(self, guest: str, domains: Sequence[int]) -> None:
        """Note that a guest has no disk any more, and had some in these domains last."""


@dataclass(slots=True, eq=False)
class _Guest:
    """A guest with disks. key: what tells it from others: its ``vm`` node, or its number. told: the
    domains of its worker. starts_left: successors that may begin at once."""

    key: str
    domains: list[int]
    told: tuple[int, ...] = ()
    worker: Worker | None = None
    task: "asyncio.Task[None] | None" = None
    restarts: int = 0
    renewing: bool = False
    starts_left: float = field(default_factory=lambda: AT_ONCE)
    began: float = 0.0
    limit: LogLimit = field(default_factory=lambda: LogLimit(None))
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def wanted(self) -> bool:
        """Whether it still has a disk."""
        return bool(self.domains)

    def renew(self) -> None:
        """Let another worker take the place of the one that it has, or is about to have."""
        if not self.renewing:
            self.renewing = True
            if self.worker is not None:
                self.worker.signal(signal.SIGTERM)

    def pause_s(self) -> float:
        """Count one start, and return how long it is to wait."""
        now = time.monotonic()
        self.starts_left = min(AT_ONCE, self.starts_left + (now - self.began) / AGAIN_S) - 1
        self.began = now
        return max(0.0, -self.starts_left * AGAIN_S)


class Supervisor:
    """Keeps a worker for each guest that has a disk under ``backend/<kind>`` of this domain.

    order: what a worker is told to do. rights: what it is given. clear: removes what killed workers
    have left, except of these domains; it is called at the start, and when a guest has no worker
    any more. For the event loop's thread.
    """

    def __init__(
        self,
        store: XenstoreClient,
        template: Template,
        kinds: Sequence[str],
        order: Order,
        *,
        clear: Callable[[Collection[int]], None],
        rights: Rights,
    ) -> None:
        self._store = store
        self._template = template
        self._kinds = kinds
        self._order = order
        self._clear = clear
        self._rights = rights
        self._guests: dict[str, _Guest] = {}
        self._watches: list[Watch] = []
        self._followers: list[asyncio.Task[None]] = []
        self._unseen: dict[int, None] = {}
        self._news = asyncio.Event()
        self._closing = False
        self._patience_s: float | None = None

    async def start(self) -> None:
        """Watch, and have served what is assigned already."""
        self._clear([domain for guest in self._guests.values() for domain in guest.domains])
        self._followers.append(asyncio.create_task(self._look()))
        for kind in self._kinds:
            watch = await self._store.watch(f"backend/{kind}")
            self._watches.append(watch)
            self._followers.append(asyncio.create_task(self._follow(kind, watch)))
        watch = await self._store.watch("error/backend")
        self._watches.append(watch)
        self._followers.append(asyncio.create_task(self._tidy(watch)))

    async def _tidy(self, watch: Watch) -> None:
        """Remove directories of errors once they are empty, which workers may not."""
        with contextlib.suppress(PeerClosed):
            async for _ in watch:
                await prune_errors(self._store, self._kinds)
                await asyncio.sleep(TIDY_S)

    async def wait(self) -> str:
        """Return when there can be no more workers: what is lost, and the remedy."""
        first = asyncio.FIRST_COMPLETED
        store = asyncio.ensure_future(asyncio.wait(self._followers, return_when=first))
        template = asyncio.ensure_future(self._template.wait())
        try:
            await asyncio.wait((store, template), return_when=first)
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
                "guest": guest.key,
                "domains": guest.domains,
                "pid": guest.worker.pid if guest.worker else None,
                "restarts": guest.restarts,
            }
            for guest in self._guests.values()
        ]

    async def close(self, patience_s: float | None = None) -> None:
        """End every worker; the disks stay as they are, for whoever serves them next.

        One that has not ended after so long is killed; None: after `END_S`.
        """
        self._closing, self._patience_s = True, patience_s
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

    def renew(self, key: str) -> None:
        """Let another worker take the place of the one that a guest has; see `worker_of`."""
        if guest := self._guests.get(key):
            guest.renew()

    async def worker_of(self, key: str) -> Worker:
        """Return a guest's worker, once it has one that stays. Raises `PeerClosed` where the guest
        has no disk any more."""
        while guest := self._guests.get(key):
            if guest.worker is not None and not guest.renewing:
                return guest.worker
            guest.changed.clear()
            await guest.changed.wait()
        raise PeerClosed("the guest has no disk any more")

    def _guest_of(self, domain: int) -> _Guest | None:
        return next((g for g in self._guests.values() if domain in g.domains), None)

    # ---- Who has disks ----

    async def _follow(self, kind: str, watch: Watch) -> None:
        with contextlib.suppress(PeerClosed):
            async for path in watch:
                parts = path.removeprefix(f"backend/{kind}").strip("/").split("/")
                names = [parts[0]] if parts[0] else await self._children(f"backend/{kind}")
                # Whose disks they are, and which: what else is written there is their backend's.
                tells = len(parts) < 3 or parts[2:] in (["params"], ["frontend"])
                self._unseen.update((int(it), None) for it in names if it.isdigit() and tells)
                self._news.set()

    async def _look(self) -> None:
        """Consider each domain once, however much is told of it meanwhile: a disk is some events,
        and to look at one is to look at all of its domain's."""
        with contextlib.suppress(PeerClosed):
            while True:
                await self._news.wait()
                self._news.clear()
                while self._unseen:
                    domain = next(iter(self._unseen))
                    del self._unseen[domain]
                    await self._consider(domain)

    async def _children(self, path: str) -> list[str]:
        try:
            return await self._store.ls(path)
        except XenstoreError:
            return []

    async def _consider(self, domain: int) -> None:
        """Have a domain's disks served, if it has any, or no more."""
        vm, has = await self._vm_of(domain), await self._disks_of(domain)
        if not vm and any(has):  # it may have come since then, or have gone with its disks
            vm, has = await self._vm_of(domain), await self._disks_of(domain)
        known = self._guest_of(domain)
        # One that is being destroyed is still the same.
        key = vm or (known.key if known is not None else str(domain))
        if self._closing:
            return
        if known is not None and (not any(has) or known.key != key):
            known.domains.remove(domain)
            if known.wanted or known.key != key:
                known.renew()  # it could still reach what belongs to another guest by now
            known.changed.set()
            known = None
        if any(has) and known is None:
            known = self._add(key, domain)
        # Also of one that lingers: its last disk may have been of another kind.
        if known is not None and not await self._rights.suits(known.key, known.domains):
            known.renew()

    async def _disks_of(self, domain: int) -> list[list[str]]:
        return [await self._children(f"backend/{kind}/{domain}") for kind in self._kinds]

    async def _vm_of(self, domain: int) -> str:
        """Tell a guest from others: another may have had the domain's number before. Empty where
        the toolstack says nothing, and of a domain that is gone."""
        with contextlib.suppress(XenstoreError):
            return await self._store.try_read(f"/local/domain/{domain}/vm") or ""
        return ""

    def _add(self, key: str, domain: int) -> _Guest:
        guest = self._guests.get(key)
        if guest is None:
            guest = self._guests[key] = _Guest(key, [domain], limit=LogLimit(Domid(domain)))
            guest.task = asyncio.create_task(self._keep(guest))
            return guest
        guest.domains.append(domain)
        if domain not in guest.told:
            guest.renew()
        guest.changed.set()
        return guest

    # ---- Its worker ----

    async def _keep(self, guest: _Guest) -> None:
        """Let a guest have a worker for as long as it has disks."""
        domains = tuple(guest.domains)
        while guest.wanted:
            await self._pause(guest, guest.pause_s())
            if not guest.wanted or self._closing:
                break
            domains = tuple(guest.domains)
            try:
                await self._serve(guest, domains)
            except (OSError, XvdError) as error:
                if guest.limit.admit(logger, logging.ERROR, _NONE):
                    logger.error(_NONE, domains[0], describe(error))
        if self._guests.get(guest.key) is guest:
            del self._guests[guest.key]
        if not self._closing and guest.key not in self._guests:  # it may be back by now
            await self._rights.gone(guest.key, domains)
        self._clear([domain for guest in self._guests.values() for domain in guest.domains])

    async def _serve(self, guest: _Guest, domains: tuple[int, ...]) -> None:
        """Let one worker serve a guest until it has ended. Raises OSError or `XvdError`."""
        began = time.monotonic()
        guest.renewing = False
        worker = await self._template.spawn(self._order(domains))
        guest.told = domains
        try:
            take_back = await self._rights.equip(worker, guest.key, domains, guest.limit)
        except BaseException:
            worker.signal(signal.SIGKILL)
            await worker.ended
            raise
        pinging = asyncio.create_task(self._ping(guest, worker))
        try:
            outgrown, guest.renewing = guest.renewing, False
            guest.worker = worker
            guest.changed.set()
            if outgrown or (tuple(guest.domains) != domains and guest.wanted):
                guest.renew()
            await self._until_over(guest, worker)
        finally:
            guest.worker = None
            pinging.cancel()
            await take_back()
        if guest.wanted and not self._closing and not guest.renewing:
            guest.restarts += 1
            if guest.limit.admit(logger, logging.ERROR, _ENDED):  # a guest may be the cause
                logger.error(_ENDED, ", ".join(map(str, domains)), time.monotonic() - began)

    async def _ping(self, guest: _Guest, worker: Worker) -> None:
        """Kill a worker that hangs: what it had is in its journals, and another goes on."""
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):  # it has ended
            while True:
                await asyncio.sleep(ping_pause_s(len(self._guests)))
                try:
                    async with asyncio.timeout(PONG_S):
                        await loop.sock_sendall(worker.channel, PING)
                        await loop.sock_recv(worker.channel, 1)
                except TimeoutError:
                    if guest.limit.admit(logger, logging.ERROR, _HANGS):
                        logger.error(_HANGS, ", ".join(map(str, guest.told)))
                    worker.signal(signal.SIGKILL)
                    return

    async def _pause(self, guest: _Guest, seconds: float) -> None:
        """Let time pass, unless something changes: a disk more or less, or the end of all."""
        guest.changed.clear()
        if seconds and guest.wanted and not self._closing:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await guest.changed.wait()

    async def _until_over(self, guest: _Guest, worker: Worker) -> None:
        """Wait until a worker has ended, by itself or as its guest has had no disk for long."""
        while not worker.ended.done():
            guest.changed.clear()
            changed = asyncio.ensure_future(guest.changed.wait())
            asked = guest.renewing or self._closing
            try:
                patience_s = END_S if self._patience_s is None else self._patience_s
                timeout = patience_s if asked else None if guest.wanted else LINGER_S
                if self._closing:
                    worker.signal(signal.SIGTERM)
                done, _ = await asyncio.wait(
                    (changed, worker.ended), timeout=timeout,
                    return_when=asyncio.FIRST_COMPLETED,
                )  # fmt: skip
            finally:
                changed.cancel()
            if done:
                continue
            if asked:
                worker.signal(signal.SIGKILL)  # it hangs; what it had is in its journals
            elif self._guests.get(guest.key) is guest:
                del self._guests[guest.key]  # a disk that comes now gets another worker
                guest.renewing = True
                worker.signal(signal.SIGTERM)
