# SPDX-License-Identifier: Apache-2.0
"""Which images a guest's worker may open: those that the toolstack has given its disks, and those
that an administrator has named since, while they are of use.

Neither can be written by the worker: the first stand in nodes that it may not change, the second
are told to the supervisor. An image that a call names may be opened until the call is over. If the
disk has moved to it then, it may be opened for as long as the disk is there, also by what the next
supervisor reads in a file.
"""

import contextlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from xvd.blkif.assignment import TOOLSTACK_NODES, parse_backend_assignment
from xvd.engines.uri import named_files, storage_uri
from xvd.errors import ConfigError, PeerClosed, XenstoreError, describe
from xvd.files import create_own, open_own, open_own_directory, remove
from xvd.machine.xs.client import XenstoreClient
from xvd.service.sandbox.reach import Image
from xvd.xenbus.directory import read_directory

logger = logging.getLogger(__name__)

_MAX: Final = 1 << 20

Kept = dict[str, list[str]]
"""By disk (``DOMID/VDEV``): the images that it may have moved to. More than one if it is not known
which."""


def _tells(node: str) -> bool:
    """Whether it says which storage a disk has; only the toolstack writes these."""
    return node in TOOLSTACK_NODES or node == "state"


def _files(uri: str, layers: Sequence[str] = ()) -> dict[str, bool] | None:
    """Return what `named_files` does: nothing for what is no storage, as nobody can open it."""
    try:
        return named_files(uri, layers)
    except ConfigError:
        return {}


def _add(images: dict[str, Image], path: str, writable: bool, made: bool) -> None:
    path = os.path.abspath(path)
    before = images.get(path, Image(False))
    images[path] = Image(writable or made or before.writable, made or before.made)


@dataclass(eq=False, slots=True)
class Named:
    """An image that a call names. moves: whether the disk is on it if the call succeeds. alone:
    whether no other call that moves the disk was there at the same time."""

    disk: str
    image: str
    moves: bool
    alone: bool = True


@dataclass(slots=True)
class _Assigned:
    """What the toolstack says of a guest's disks. storage: each URI, and whether it may be written
    to. disks: their names. whole: whether the store told all of it."""

    storage: list[tuple[str, bool]] = field(default_factory=list)
    disks: set[str] = field(default_factory=set)
    whole: bool = True


class Images:
    """The images of one guest. For the event loop's thread, but for `withdrawals`.

    kinds: of the disks that are served. layers: in front of each. directory, name: where is kept
    what disks have moved to.
    """

    def __init__(
        self,
        store: XenstoreClient,
        kinds: Sequence[str],
        layers: Sequence[str],
        directory: Path,
        name: str,
    ) -> None:
        self._store = store
        self._kinds = kinds
        self._layers = layers
        self._directory = directory
        self._name = name
        self._calls: list[Named] = []
        self._moved: Kept = self._read()
        self._written = self._to_keep()
        self._had: set[str] = set()
        self._withdrawals = 0

    def withdrawals(self) -> int:
        """Return how often something could be opened no more: what was found before is old."""
        return self._withdrawals

    async def find(self, domains: Sequence[int]) -> dict[str, Image]:
        """Return how each file may be opened, by its path from the root.

        domains: those of a worker; the guest may have more by now.
        """
        found: dict[str, Image] = {}
        assigned = [(*one, False) for one in (await self._assigned(domains)).storage]
        for uri, writable, new in [*assigned, *((uri, True, True) for uri in self._granted())]:
            for path, made in (_files(uri, self._layers) or {}).items():
                if path:  # a drive without a disc has none
                    _add(found, path, writable, made or new)
        return found

    async def confinable(self, domains: Sequence[int]) -> bool:
        """Whether all of its storage can be served without programs and networks. What belongs to
        disks that are gone is forgotten.

        domains: all that the guest has.
        """
        assigned = await self._assigned(domains)
        if assigned.whole:
            self._forget_others(assigned)
        uris = [*self._granted(), *(uri for uri, _ in assigned.storage)]
        return all(_files(uri) is not None for uri in uris)

    async def _assigned(self, domains: Sequence[int]) -> _Assigned:
        """Ask the store for the disks of these domains."""
        found = _Assigned()
        for path in [f"backend/{kind}/{domain}" for kind in self._kinds for domain in domains]:
            try:
                await self._look(path, found)
            except XenstoreError as error:
                found.whole &= error.code == "ENOENT"
            except PeerClosed:
                found.whole = False
        return found

    async def _look(self, path: str, found: _Assigned) -> None:
        for vdev in await self._store.ls(path):
            found.disks.add(f"{path.rpartition('/')[2]}/{vdev}")
            nodes = await read_directory(self._store, f"{path}/{vdev}", _tells)
            with contextlib.suppress(ConfigError):
                assignment = parse_backend_assignment(nodes)
                found.storage.append((storage_uri(assignment), assignment.writable))

    def _forget_others(self, found: _Assigned) -> None:
        """Withdraw what no disk has any more."""
        gone, has = self._moved.keys() - found.disks, {uri for uri, _ in found.storage}
        for disk in gone:
            del self._moved[disk]
        if gone or self._had - has:
            self._withdrawals += 1
        self._had = has
        self._settle()

    # ---- What an administrator names ----

    def _granted(self) -> list[str]:
        moved = [image for images in self._moved.values() for image in images]
        return list(dict.fromkeys([*moved, *(call.image for call in self._calls)]))

    def begin(self, disk: str, image: str, *, moves: bool) -> Named:
        """Let the guest's worker open an image, or make it, until `end` gets what is returned.

        moves: the disk is to go on there. Raises OSError or `ConfigError`, and then nothing is.
        """
        named = Named(disk, image, moves)
        for other in self._calls if moves else ():
            if other.moves and other.disk == disk:
                other.alone = named.alone = False
        self._calls.append(named)
        try:
            self._keep()
        except BaseException:
            self._calls.remove(named)
            raise
        return named

    def end(self, named: Named, done: bool | None) -> None:
        """A call is over. done: whether it was done; None: nobody knows."""
        self._calls.remove(named)
        if named.moves and done is not False:
            before = [] if done and named.alone else self._moved.get(named.disk, [])
            self._moved[named.disk] = list(dict.fromkeys([*before, named.image]))
        self._withdrawals += 1
        self._settle()

    def forget(self) -> None:
        """Forget everything: the guest has no disks any more."""
        self._moved.clear()
        self._withdrawals += 1
        self._settle()

    # ---- What is kept ----

    def _to_keep(self) -> Kept:
        kept = {disk: list(images) for disk, images in self._moved.items()}
        for call in self._calls:
            if call.moves:
                kept.setdefault(call.disk, []).append(call.image)
        return kept

    def _settle(self) -> None:
        """Write down what changed; where that fails, the next supervisor finds too much."""
        try:
            self._keep()
        except (OSError, ConfigError) as error:
            logger.warning("%s: cannot be written: %s", self._name, describe(error))

    def _keep(self) -> None:
        """Write down what there is to be known after us. Raises OSError or `ConfigError`."""
        kept = self._to_keep()
        if kept == self._written:
            return
        directory = open_own_directory(self._directory)
        try:
            remove(directory, f"{self._name}.new")
            if kept:
                fd = create_own(directory, f"{self._name}.new")
                with open(fd, "wb") as file:
                    file.write(msgspec.json.encode(kept))
                names = f"{self._name}.new", self._name
                os.rename(*names, src_dir_fd=directory, dst_dir_fd=directory)
            else:
                remove(directory, self._name)
        finally:
            os.close(directory)
        self._written = kept

    def _read(self) -> Kept:
        with contextlib.suppress(OSError, ConfigError, msgspec.MsgspecError):
            directory = open_own_directory(self._directory)
            try:
                fd = open_own(directory, self._name)
            finally:
                os.close(directory)
            if fd is not None:
                with open(fd, "rb") as file:
                    return msgspec.json.decode(file.read(_MAX), type=Kept)
        return {}
