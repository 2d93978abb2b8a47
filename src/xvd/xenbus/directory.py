# SPDX-License-Identifier: Apache-2.0
"""How a device lives in the store: its directory read as a dict, and changed in one transaction."""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from xvd.blkif.nodes import DIRECTORIES
from xvd.errors import XenstoreError
from xvd.machine.xs import requests
from xvd.machine.xs.client import Transaction, XenstoreClient

READS_MAX: Final = 2048
"""Most nodes read from one device's directory: 64 queues of 16 pages and more; a directory with
more was filled by somebody to keep us busy."""

_ABSENT: Final = ("ENOENT", "EACCES")


async def read_directory(
    store: XenstoreClient | Transaction, path: str, wanted: Callable[[str], bool]
) -> dict[str, str]:
    """The nodes below `path`, two levels deep, by relative path; empty if it is not there.

    `wanted` is asked for each name, of a second level by its whole path unless it is a queue's:
    what it does not want is not read, nor what is below it. A
    value that is no text is read as an empty one, which every parser takes as absent. Raises
    `XenstoreError` E2BIG for a directory of more than `READS_MAX` wanted nodes, or of more names
    than one message holds: somebody filled it to keep us busy.
    """
    found: dict[str, str] = {}
    names = [name for name in await _children(store, path) if wanted(name)]
    paths = [*names]
    for name in names:
        if name.startswith(DIRECTORIES):
            children = await _children(store, f"{path}/{name}")
            paths += [f"{name}/{child}" for child in children if wanted(_kind_of(name, child))]
        if len(paths) > READS_MAX:
            raise XenstoreError("E2BIG", f"{path} holds more than {READS_MAX} nodes")
    values = await store.ask_each([requests.read(f"{path}/{name}") for name in paths])
    for name, value in zip(paths, values, strict=True):
        if isinstance(value, bytes):
            found[name] = value.decode("ascii", "replace")
        elif value.code not in _ABSENT:
            raise value
    return found


def _kind_of(name: str, child: str) -> str:
    """Return by which name a node of the second level is known: each queue has the same."""
    return child if name.startswith("queue-") else f"{name}/{child}"


async def _children(store: XenstoreClient | Transaction, path: str) -> list[str]:
    try:
        return await store.ls_short(path)
    except XenstoreError as error:
        if error.code in _ABSENT:
            return []
        if error.code == "E2BIG":
            raise XenstoreError(
                "E2BIG", f"{path} holds more nodes than any driver writes"
            ) from None
        raise


async def change_device(
    store: XenstoreClient,
    path: str,
    *,
    state: int | None,
    write: Mapping[str, str] | None = None,
    remove: Iterable[str] = (),
    not_in: int | None = None,
) -> bool:
    """Write a device's own nodes and its state in one transaction; False if the device is gone.

    `not_in`: a state that only a new device has; with it, the directory is another's by now.

    A state node that is not there any more was removed by the toolstack: nothing is written, or a
    late write would bring back a directory that nobody removes again.
    """

    async def work(tx: Transaction) -> bool:
        now = await tx.try_read(f"{path}/state")
        if now is None or (not_in is not None and now == str(int(not_in))):
            return False
        await tx.rm_each(f"{path}/{name}" for name in remove)
        await tx.ask_all([requests.write(f"{path}/{name}", nodes[name]) for name in nodes])
        return True

    nodes = dict(write or {})
    if state is not None:
        nodes["state"] = str(state)
    return await store.transact(work)


async def remove_device(store: XenstoreClient, path: str, only_if: Mapping[str, str]) -> None:
    """Remove a device's directory, and the one of its frontend's domain if that is empty then.

    Nothing happens unless its nodes read as in `only_if`: the toolstack may have added another
    device of the same name.
    """

    async def remove(tx: Transaction) -> None:
        found = await tx.ask_each([requests.read(f"{path}/{name}") for name in only_if])
        if found == [value.encode() for value in only_if.values()]:
            await tx.rm(path)

    await store.transact(remove)
    await remove_if_empty(store, path.rpartition("/")[0])


async def remove_if_empty(store: XenstoreClient, path: str) -> None:
    """Remove a directory that has nothing in it, if it is there and ours to remove."""

    async def work(tx: Transaction) -> None:
        if await tx.exists(path) and not await _children(tx, path):
            await tx.rm(path)

    with contextlib.suppress(XenstoreError):  # libxl makes it domain 0's
        await store.transact(work)


async def _prune(tx: Transaction, path: str) -> None:
    """Remove a directory, and those above it that are empty then, as far as we may."""
    await tx.rm_each([path])
    with contextlib.suppress(XenstoreError):
        while (path := path.rpartition("/")[0]) and not await _children(tx, path):
            await tx.rm_each([path])


async def report_error(store: XenstoreClient, path: str, text: str) -> None:
    """Write a device's error where Linux writes it: ``error/<path>/error`` of our own domain.

    text: "" removes it. `path` is relative to our domain. A store that refuses (quota) is no second
    failure. Of a device that the toolstack has removed nothing is written: nobody would remove it
    again.
    """

    async def work(tx: Transaction) -> None:
        if not await tx.exists(path):
            return
        if text:
            await tx.write(f"error/{path}/error", text)
        else:
            await _prune(tx, f"error/{path}")

    with contextlib.suppress(XenstoreError):
        await store.transact(work)


async def prune_errors(store: XenstoreClient, kinds: Iterable[str]) -> None:
    """Remove what `report_error` may leave: directories of these kinds with nothing in them."""

    async def work(tx: Transaction) -> None:
        for kind in kinds:
            path = f"error/backend/{kind}"
            if await tx.exists(path) and not await _children(tx, path):
                await _prune(tx, path)

    with contextlib.suppress(XenstoreError):
        await store.transact(work)
