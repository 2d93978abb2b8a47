# SPDX-License-Identifier: Apache-2.0
"""What a worker is given, as descriptors: the supervisor's side and the worker's.

The first message on the stream between the two is `Given`, with the descriptors beside it. A
confined worker answers with the descriptor on which its opens are answered.
"""

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from xvd.errors import PeerClosed
from xvd.files import give, hold, take_away
from xvd.loglimit import LogLimit
from xvd.machine.emulated.link import LinkClient
from xvd.machine.emulated.machine import EmulatedMachine
from xvd.machine.emulated.paths import MACHINE_SOCKET
from xvd.machine.interface import Machine
from xvd.machine.xen import xenstore
from xvd.machine.xen.machine import XenMachine
from xvd.machine.xs.client import Reader, Writer, XenstoreClient
from xvd.service.sandbox.confine import (
    Confinement,
    confine,
    drop_capabilities,
    own_user,
)
from xvd.service.sandbox.landlock import KEEP_FILES
from xvd.service.sandbox.opener import Opener
from xvd.service.sandbox.reach import Image
from xvd.service.sandbox.storegate import Rules, StoreGate
from xvd.service.template import Worker
from xvd.service.workerlog import Allowance, WorkerLog, log_to
from xvd.types import Domid

_MESSAGE_MAX: Final = 1 << 16
_FDS_MAX: Final = 64
_ANSWERS_S: Final = 10.0
"""In which a worker that was forked confines itself."""

Images = Callable[[], Awaitable[Mapping[str, Image]]]


class Given(msgspec.Struct):
    """What a worker is told of what it is given.

    domid: the domain that it runs in. session: of the emulated host; None: on real Xen. confined:
    whether it is to be. user: whom it is to become. directories: those that it may keep files in,
    each with a descriptor, behind the log's, the store's and the session's.
    """

    domid: int
    session: int | None
    confined: bool
    user: int | None
    directories: list[str]


@dataclass(frozen=True, slots=True)
class Place:
    """Where workers serve.

    machine: the supervisor's own. directory: of the host's daemons. states: where the guests'
    directories of journals are. kinds: of the disks that are served. pages: where the pages for
    xentop are.
    """

    machine: Machine
    directory: Path
    states: Path
    kinds: Sequence[str]
    pages: Path


async def equip(
    worker: Worker,
    domains: Sequence[int],
    place: Place,
    *,
    confined: bool,
    images: Images,
    withdrawals: Callable[[], int],
    limit: LogLimit,
    allowance: Allowance,
) -> Callable[[], Awaitable[None]]:
    """Give a new worker what it is to have; what is returned takes all back, once it has ended.

    images: asked for each file that it wants to open, what its guest has. withdrawals: how often
    there was less of that than before. allowance: what its guest may say. Raises OSError, and
    `PeerClosed` if the host is gone or the worker does not confine itself.
    """
    user = own_user(domains[0]) if confined else None
    async with contextlib.AsyncExitStack() as stack:
        given = contextlib.ExitStack()  # what is the worker's alone, once it has it
        stack.enter_context(given)
        session, fds = None, []
        if isinstance(place.machine, EmulatedMachine):
            reader, writer, session, link = await _emulated(place, domains)
            fds.append(given.enter_context(link).fileno())
        else:
            reader, writer = await xenstore.streams()
        gate = StoreGate(reader, writer, Rules(place.machine.domid, domains, place.kinds))
        stack.push_async_callback(gate.close)
        kept = [place.states / str(domain) for domain in domains]
        pages = place.pages / f"td3-{worker.pid}"
        if "vbd3" in place.kinds:
            kept.append(pages)
            stack.callback(take_away, pages)
        owner = os.geteuid() if user is None else user
        for path in kept:
            fds.append(give(path, owner, 0o755 if path == pages else 0o750))
            given.callback(os.close, fds[-1])
        log = WorkerLog(domains, allowance)
        given.callback(os.close, log.its)
        stack.callback(log.close)
        fds[:0] = [log.its, given.enter_context(gate.theirs).fileno()]
        told = Given(place.machine.domid, session, confined, user, [str(path) for path in kept])
        socket.send_fds(worker.channel, [msgspec.json.encode(told)], fds)
        given.close()
        if confined:
            withdrawn = withdrawals()
            has, listener = await asyncio.gather(images(), _listener_of(worker))
            own = frozenset(map(os.path.realpath, kept))
            opener = Opener(
                listener, pid=worker.pid, domains=tuple(domains), own=own, has=has, images=images,
                withdrawals=withdrawals, withdrawn=withdrawn, limit=limit,
            )  # fmt: skip
            stack.callback(opener.close)
        return stack.pop_all().aclose
    raise AssertionError


async def _emulated(
    place: Place, domains: Sequence[int]
) -> tuple[Reader, Writer, int, socket.socket]:
    """Open a session that has to do with these domains only, and a way to the store beside it."""

    def opened() -> tuple[socket.socket, int, socket.socket]:
        link = LinkClient(place.directory / MACHINE_SOCKET, place.machine.domid)
        try:
            store = link.xenstore()
            link.restrict(*domains)
        except BaseException:
            link.close()
            raise
        return store, link.number, link.detach()

    store, number, link = await asyncio.to_thread(opened)
    reader, writer = await asyncio.open_connection(sock=store)
    return reader, writer, number, link


async def _listener_of(worker: Worker) -> int:
    """Wait for a worker to be confined. Raises `PeerClosed` where it ends instead."""
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(worker.channel, ready.set)
    worker.ended.add_done_callback(lambda _: ready.set())
    try:
        async with asyncio.timeout(_ANSWERS_S):
            await ready.wait()
    except TimeoutError:
        raise PeerClosed("a worker did not confine itself in time") from None
    finally:
        if worker.channel.fileno() >= 0:
            loop.remove_reader(worker.channel)
    fds: list[int] = []
    with contextlib.suppress(OSError):  # it has ended, and its channel with it
        _, fds, _, _ = socket.recv_fds(worker.channel, 1, 1)
    if not fds:
        raise PeerClosed("a worker could not confine itself; its log line says why")
    return fds[0]


# ---- In the worker -------------------------------------------------------------------------------


def take(channel: socket.socket) -> tuple[Given, Machine]:
    """Take what the supervisor gives, and be confined, if that is to be; the machine that is left.

    By the process's only thread, which waits for it. Raises `PeerClosed` if nothing is given.
    """
    data, fds, _, _ = socket.recv_fds(channel, _MESSAGE_MAX, _FDS_MAX)
    if not data:
        raise PeerClosed("the supervisor is gone")
    for fd in fds:
        os.set_inheritable(fd, False)
    given = msgspec.json.decode(data, type=Given)
    log_to(fds.pop(0))
    store = socket.socket(fileno=fds.pop(0))
    link = None if given.session is None else socket.socket(fileno=fds.pop(0))
    paths = [Path(path) for path in given.directories]
    for path, fd in zip(paths, fds, strict=True):
        hold(path, fd)
    if given.confined:
        listener = confine(Confinement(given.user, dict.fromkeys(paths, KEEP_FILES)))
        try:
            socket.send_fds(channel, [b"l"], [listener])
        finally:
            os.close(listener)  # a worker is not to answer for itself
    else:
        drop_capabilities()
    return given, _machine(given, link, store)


def _machine(given: Given, link: socket.socket | None, store: socket.socket) -> Machine:
    async def connect() -> XenstoreClient:
        return await XenstoreClient.from_socket(store)

    domid = Domid(given.domid)
    if link is None:
        return XenMachine(domid, connect)
    assert given.session is not None
    return EmulatedMachine(LinkClient.adopt(link, domid, given.session), connect)
