# SPDX-License-Identifier: Apache-2.0
"""What the worker of each guest may reach, and how it is reached itself."""

import contextlib
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from xvd.cli.relay import Over, Relay
from xvd.cli.wanted import Wanted
from xvd.engines.uri import named_files
from xvd.errors import PeerClosed
from xvd.loglimit import LogLimit
from xvd.machine.xs.client import XenstoreClient
from xvd.service.sandbox.equipment import Place, equip
from xvd.service.sandbox.images import Images
from xvd.service.supervisor import Supervisor
from xvd.service.template import Worker
from xvd.service.workerlog import Allowance
from xvd.types import DOM0
from xvd.xenbus.directory import remove_if_empty

_MOVING: Final = ("swap", "pivot")
"""Calls after which a disk is on the image that they name, or that its mirror was begun with."""
_NO_NAME: Final = re.compile(r"[^0-9A-Za-z-]+")


@dataclass(slots=True)
class _Guest:
    """A guest: what it may open, its sockets, and whether its worker is confined. targets: of each
    disk, the image of its last mirror. allowance: what it may say in the log."""

    images: Images
    relay: Relay
    name: str
    confined: bool = False
    targets: dict[str, str] = field(default_factory=dict)
    allowance: Allowance = field(default_factory=Allowance)


def _nothing(_: bool | None) -> None:
    """End a call that names nothing."""


class GuestRights:
    """`Rights` of the workers of a backend's daemon. For the event loop's thread.

    place: where they serve. own: the supervisor's control socket; a worker's has its guest's number
    behind that name. `supervisor` is to be set before any guest comes.
    """

    supervisor: Supervisor

    def __init__(self, wanted: Wanted, store: XenstoreClient, place: Place, own: Path) -> None:
        self._wanted = wanted
        self._store = store
        self._place = place
        self._own = own
        self._guests: dict[str, _Guest] = {}

    async def equip(
        self, worker: Worker, guest: str, domains: Sequence[int], limit: LogLimit
    ) -> Callable[[], Awaitable[None]]:
        """See `Rights.equip`."""
        found = await self._known(guest, domains)
        fenced = self._wanted.isolation == "guest"
        found.confined = fenced and await found.images.confinable(domains)
        return await equip(
            worker, domains, self._place,
            confined=found.confined, images=partial(found.images.find, domains),
            withdrawals=found.images.withdrawals, limit=limit, allowance=found.allowance,
        )  # fmt: skip

    async def _known(self, guest: str, domains: Sequence[int]) -> _Guest:
        """Return what there is of a guest, reachable under its first domain's number."""
        name = f"{self._own.name}-{domains[0]}"
        found = self._guests.get(guest)
        if found is None:
            granted = f"granted-{_NO_NAME.sub('-', guest).strip('-')}"
            images = Images(
                self._store, self._place.kinds, self._wanted.layers, self._place.states, granted
            )
            found = self._guests[guest] = _Guest(images, self._relay(guest), name)
        elif found.name != name:
            await found.relay.close()
            found.relay, found.name = self._relay(guest), name
        else:
            return found
        await found.relay.listen(self._own.with_name(name))
        return found

    def _relay(self, guest: str) -> Relay:
        return Relay(partial(self.supervisor.worker_of, guest), partial(self._hear, guest))

    def _hear(self, guest: str, method: str, disk: str, image: str) -> Over:
        """Let a guest's worker open what a call names for as long as the call takes, and if its
        disk has moved there, from then on. See `Relay`."""
        found = self._guests.get(guest)
        if found is None:
            raise PeerClosed("the guest has no disk any more")
        if method == "pivot":
            image = found.targets.get(disk, "")
        if not image:
            return _nothing
        takes_programs = named_files(image) is None
        named = found.images.begin(disk, image, moves=method in _MOVING)
        if found.confined and takes_programs:
            self.supervisor.renew(guest)

        def over(done: bool | None) -> None:
            if method == "mirror" and done:
                found.targets[disk] = image
            found.images.end(named, done)

        return over

    async def suits(self, guest: str, domains: Sequence[int]) -> bool:
        """See `Rights.suits`."""
        found = self._guests.get(guest)
        return found is None or await found.images.confinable(domains) or not found.confined

    async def gone(self, guest: str, domains: Sequence[int]) -> None:
        """See `Rights.gone`."""
        found = self._guests.pop(guest, None)
        if found is not None:
            found.images.forget()
            await found.relay.close()
        for domain in domains:
            with contextlib.suppress(OSError):  # it is not there, or another guest's by now
                (self._place.states / str(domain)).rmdir()
            if self._place.machine.domid != DOM0:  # nobody else removes it in a driver domain
                for kind in self._place.kinds:
                    await remove_if_empty(self._store, f"backend/{kind}/{domain}")

    def is_confined(self, guest: str) -> bool:
        """Whether a guest's worker can reach nothing but its disks."""
        found = self._guests.get(guest)
        return found is not None and found.confined

    async def close(self) -> None:
        """Stop listening for every guest."""
        for found in self._guests.values():
            await found.relay.close()
