# SPDX-License-Identifier: Apache-2.0
"""Which images a guest's worker may open: those that the toolstack has given its disks, and those
that an administrator has named since.

Neither can be written by the worker: the first stand in nodes that it may not change, the second
are told to the supervisor, which keeps them in a file of its own until the guest has no disks.
"""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from xvd.blkif.assignment import TOOLSTACK_NODES, parse_backend_assignment
from xvd.engines.uri import named_files, storage_uri
from xvd.errors import ConfigError, PeerClosed, XenstoreError
from xvd.files import create_own, open_own, open_own_directory, remove
from xvd.machine.xs.client import XenstoreClient
from xvd.service.sandbox.reach import Image
from xvd.xenbus.directory import read_directory

_MAX: Final = 1 << 20


def _tells(node: str) -> bool:
    """Whether it says which storage a disk has; only the toolstack writes these."""
    return node in TOOLSTACK_NODES or node == "state"


def _add(images: dict[str, Image], path: str, writable: bool, made: bool) -> None:
    path = os.path.abspath(path)
    before = images.get(path, Image(False))
    images[path] = Image(writable or made or before.writable, made or before.made)


class Images:
    """The images of one guest. For the event loop's thread.

    kinds: of the disks that are served. layers: in front of each. directory, name: where what was
    granted is kept.
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
        self._granted: list[str] = self._kept()

    async def find(self, domains: Sequence[int]) -> dict[str, Image]:
        """Return how each file may be opened, by its path from the root."""
        found: dict[str, Image] = {}
        assigned = [(uri, writable, False) for uri, writable in await self._assigned(domains)]
        for uri, writable, new in [*assigned, *((uri, True, True) for uri in self._granted)]:
            for path, made in (named_files(uri, self._layers) or {}).items():
                if path:  # a drive without a disc has none
                    _add(found, path, writable, made or new)
        return found

    async def confinable(self, domains: Sequence[int]) -> bool:
        """Whether all of its storage can be served without programs and networks."""
        uris = [*self._granted, *(uri for uri, _ in await self._assigned(domains))]
        with contextlib.suppress(ConfigError):
            return all(named_files(uri) is not None for uri in uris)
        return True

    async def _assigned(self, domains: Sequence[int]) -> list[tuple[str, bool]]:
        """Each storage that the toolstack names, and whether it may be written to."""
        found: list[tuple[str, bool]] = []
        for path in [f"backend/{kind}/{domain}" for kind in self._kinds for domain in domains]:
            with contextlib.suppress(PeerClosed, XenstoreError):
                for vdev in await self._store.ls(path):
                    nodes = await read_directory(self._store, f"{path}/{vdev}", _tells)
                    with contextlib.suppress(ConfigError):
                        assignment = parse_backend_assignment(nodes)
                        found.append((storage_uri(assignment), assignment.writable))
        return found

    def grant(self, uri: str) -> None:
        """Let the guest's worker open this too, or make it, as an administrator has said. Raises
        OSError."""
        if uri in self._granted:
            return
        self._granted.append(uri)
        directory = open_own_directory(self._directory)
        try:
            remove(directory, f"{self._name}.new")
            fd = create_own(directory, f"{self._name}.new")
            try:
                os.write(fd, msgspec.json.encode(self._granted))
            finally:
                os.close(fd)
            os.rename(f"{self._name}.new", self._name, src_dir_fd=directory, dst_dir_fd=directory)
        finally:
            os.close(directory)

    def forget(self) -> None:
        """The guest has no disks any more: what was granted is not, the next time."""
        self._granted.clear()
        with contextlib.suppress(OSError):
            (self._directory / self._name).unlink()

    def _kept(self) -> list[str]:
        with contextlib.suppress(OSError, ConfigError, msgspec.MsgspecError):
            directory = open_own_directory(self._directory)
            try:
                fd = open_own(directory, self._name)
            finally:
                os.close(directory)
            if fd is not None:
                with open(fd, "rb") as file:
                    return msgspec.json.decode(file.read(_MAX), type=list[str])
        return []
