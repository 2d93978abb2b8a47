# SPDX-License-Identifier: Apache-2.0
"""What a guest's worker can do when it is its guest's: a program that is one, and tries.

Prints two JSON objects: what was tried, and what came of it ("done", or the error's name), by a
worker, and as far as that harms nobody by its supervisor, which is not confined. Guest 1 is the
worker's, 2 another. Takes a directory.
"""

import asyncio
import contextlib
import ctypes
import errno
import json
import logging
import mmap
import os
import signal
import socket
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xvd.errors import XenstoreError, XvdError
from xvd.loglimit import LogLimit
from xvd.machine.emulated.machine import EmulatedMachine
from xvd.machine.emulated.service import EmulatedHost, connect
from xvd.service.sandbox.equipment import Place, equip, take
from xvd.service.sandbox.images import Images
from xvd.service.template import Template
from xvd.service.workerlog import Allowance
from xvd.toolstack.vbd import add, create_guest
from xvd.toolstack.xldisk import parse_xl_disk
from xvd.types import DOM0, Domid, Port

LIBC = ctypes.CDLL(None, use_errno=True)
PLACE = Path(sys.argv[1])
OUT = os.pipe()
FLOOD = 5000
STANDARD = {number: os.readlink(f"/proc/self/fd/{number}") for number in (1, 2)}
OVER, IS_OVER = os.pipe(), os.pipe()
"""The worker says that the call that names an image is over, and hears that it is."""
OURS = os.getpid()
SIZE = 1 << 20
DISKS = {
    1: {"1.img": "vdev=xvda", "read.img": "vdev=xvdb,access=ro"},
    2: {"2.img": "vdev=xvda"},
}


def call(name: str, *arguments: object) -> None:
    """Make a system call by the C library's name."""
    ctypes.set_errno(0)
    if getattr(LIBC, name)(*arguments) == -1:
        raise OSError(ctypes.get_errno(), name)


def opened(path: str | Path, flags: int = os.O_RDONLY) -> None:
    """Open and close a file."""
    os.close(os.open(path, flags))


def again(path: Path, flags: int) -> None:
    """Open an image to read it, and its descriptor once more."""
    fd = os.open(path, os.O_RDONLY)
    try:
        opened(f"/proc/self/fd/{fd}", flags)
    finally:
        os.close(fd)


def connected(path: Path) -> None:
    """Connect to a socket."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))


def read_image() -> None:
    """Read what the guest may read."""
    fd = os.open(PLACE / "1.img", os.O_RDWR)
    try:
        assert os.pread(fd, 4, 0) == b"\0\0\0\0"
        os.pwrite(fd, b"1", 0)
        os.fdatasync(fd)
    finally:
        os.close(fd)


def journal(domain: int) -> None:
    """Make a file in a guest's state directory, and remove it."""
    path = PLACE / "states" / str(domain) / "probe"
    opened(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    path.unlink()


def descriptors() -> dict[int, str]:
    """What each of its descriptors is, but for the one by which they are listed."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


def own_journal() -> None:
    """The same by the descriptor that it was given."""
    fd = next(number for number, path in descriptors().items() if path.endswith("/states/1"))
    os.close(os.open("probe", os.O_RDWR | os.O_CREAT | os.O_EXCL, dir_fd=fd))
    os.unlink("probe", dir_fd=fd)


def ring_with(flags: int) -> None:
    """Make an io_uring of a kind."""
    parameters = bytearray(struct.pack("=4I", 0, 0, flags, 0).ljust(120, b"\0"))
    ring = LIBC.syscall(425, 1, (ctypes.c_char * 120).from_buffer(parameters))
    if ring < 0:
        raise OSError(ctypes.get_errno(), "io_uring_setup")
    os.close(ring)


def ring_of_liburing() -> None:
    """Make one as liburing 2.5 does: without an array, or else, if that is invalid, with one."""
    try:
        ring_with(1 << 16)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        ring_with(0)


def by_io_uring(entry: bytes) -> None:
    """Do one operation of io_uring, which no filter of system calls sees."""
    parameters = bytearray(120)
    array = (ctypes.c_char * 120).from_buffer(parameters)
    ring = LIBC.syscall(425, 1, array)
    if ring < 0:
        raise OSError(ctypes.get_errno(), "io_uring_setup")
    _, tail, _, _, _, _, order = struct.unpack_from("=7I", parameters, 40)
    _, done, _, _, _, results = struct.unpack_from("=6I", parameters, 80)
    rings, entries = mmap.mmap(ring, 4096), mmap.mmap(ring, 64, offset=0x10000000)
    entries[: len(entry)] = entry
    rings[order : order + 4], rings[tail : tail + 4] = bytes(4), struct.pack("=I", 1)
    call("syscall", 426, ring, 1, 1, 1, None, 0)
    assert struct.unpack_from("=I", rings, done)[0] == 1
    result = struct.unpack_from("=i", rings, results + 8)[0]
    if result < 0:
        raise OSError(-result, "an operation of io_uring")


def opened_by_io_uring(path: str) -> None:
    """Open a file by IORING_OP_OPENAT."""
    name = ctypes.create_string_buffer(path.encode())
    at = ctypes.addressof(name)
    by_io_uring(struct.pack("=BBHiQQII", 18, 0, 0, -100, 0, at, 0, os.O_RDONLY))


def socket_by_io_uring() -> None:
    """Make a socket by IORING_OP_SOCKET."""
    by_io_uring(struct.pack("=BBHiQQII", 45, 0, 0, socket.AF_INET, socket.SOCK_STREAM, 0, 0, 0))


def after_the_call() -> None:
    """Open an image that a call had named, and that was opened while it lasted."""
    os.write(OVER[1], b"x")
    os.read(IS_OVER[0], 1)
    opened(PLACE / "named.img", os.O_RDWR)


def flood() -> None:
    """Say so much that the log would be full of it, by all that it has, and in others' names."""
    lie = json.dumps([50, "xvd.backend", "2/xvda: FLOOD", "2", "xvda", "failed"])
    for fd in (1, 2):
        os.set_blocking(fd, True)
        for _ in range(FLOOD // 2):
            os.write(fd, b"FLOOD\n\x1e" + lie.encode() + b"\n")


def said_to_the_host() -> None:
    """Say something on a socket that was left to it."""
    for number in descriptors():
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(number)) as sock:
            if sock.type == socket.SOCK_DGRAM:
                sock.sendto(b"MESSAGE=FLOOD", str(PLACE / "journal"))
                return
    raise OSError(errno.EBADF, "no such socket")


def said_by_a_socket_of_its_own() -> None:
    """Say something on a socket that needs no name and no right to be made."""
    with socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0] as sock:
        sock.sendto(b"MESSAGE=FLOOD", str(PLACE / "journal"))


def same_output() -> None:
    """Have a file as its output that is its supervisor's too."""
    for number in (1, 2):
        if descriptors()[number] == STANDARD[number]:
            return
    raise OSError(errno.EBADF, "no such descriptor")


SYSTEM: dict[str, Callable[[], object]] = {
    "use its own image": read_image,
    "use its own state directory": own_journal,
    "use what an administrator's call names": lambda: opened(PLACE / "named.img", os.O_RDWR),
    "use it when the call is over": after_the_call,
    "say more than a guest may": flood,
    "say something on a socket of its supervisor's": said_to_the_host,
    "say something on a socket of its own": said_by_a_socket_of_its_own,
    "have its supervisor's output": same_output,
    "read what everybody may of the system": lambda: opened("/proc/meminfo"),
    "have a ring": ring_of_liburing,
    "have a ring that a thread of the kernel polls": lambda: ring_with(1 << 1),
    "write to its read-only image": lambda: opened(PLACE / "read.img", os.O_RDWR),
    "write to it by its descriptor": lambda: again(PLACE / "read.img", os.O_RDWR),
    "cut its own image": lambda: opened(PLACE / "1.img", os.O_RDWR | os.O_TRUNC),
    "read another guest's image": lambda: opened(PLACE / "2.img"),
    "read it behind dots": lambda: opened(f"{PLACE}/x/../2.img"),
    "use another guest's state directory": lambda: journal(2),
    "read a secret of the host": lambda: opened("/etc/shadow"),
    "read it by io_uring": lambda: opened_by_io_uring("/etc/passwd"),
    "read a file of the host": lambda: opened("/etc/passwd"),
    "list a directory of the host": lambda: os.listdir("/etc"),
    "make a file": lambda: opened("/tmp/probe", os.O_RDWR | os.O_CREAT),
    "make a directory": lambda: os.mkdir("/tmp/probe"),
    "make a link": lambda: os.symlink("/etc", "/tmp/probe"),
    "read its supervisor's memory": lambda: opened(f"/proc/{OURS}/mem"),
    "read its own memory as a file": lambda: opened("/proc/self/mem"),
    "have a socket of the network": lambda: socket.socket(socket.AF_INET),
    "have one by io_uring": socket_by_io_uring,
    "have a socket of the host": lambda: connected(PLACE / "host/socket"),
    "have a netlink socket": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
    "start a process": os.fork,
    "start a program": lambda: os.execv("/bin/true", ["true"]),
    "signal its supervisor": lambda: os.kill(OURS, signal.SIGKILL),
    "signal it by a descriptor": lambda: os.pidfd_open(OURS),
    "trace its supervisor": lambda: call("ptrace", 16, OURS, 0, 0),
    "read its memory by a call": lambda: call("process_vm_readv", OURS, 0, 0, 0, 0, 0),
    "become root": lambda: os.setresuid(0, 0, 0),
    "change its root": lambda: os.chroot("/"),
    "mount something": lambda: call("mount", b"none", b"/mnt", b"tmpfs", 0, None),
    "have a namespace": lambda: call("unshare", 0x10000000),
    "load a program into the kernel": lambda: call("syscall", 321, 0, None, 0),
    "use the kernel's keys": lambda: call("syscall", 250, 0, -3, 0),
    "count events of the CPU": lambda: call("syscall", 298, None, 0, 0, -1, 0),
    "handle its own page faults": lambda: call("syscall", 323, 0),
    "type into a terminal": lambda: call("ioctl", 0, 0x5412, b"x"),
    "raise its limits": lambda: call("syscall", 302, 0, 7, b"\xff" * 16, None),
}


HARMLESS = (
    "write to its read-only image", "write to it by its descriptor", "read another guest's image",
    "use another guest's state directory", "read a secret of the host", "read a file of the host",
    "read it by io_uring", "have one by io_uring", "list a directory of the host",
    "have a socket of the network", "have a ring that a thread of the kernel polls",
    "have a socket of the host", "have a netlink socket", "signal it by a descriptor",
)  # fmt: skip


def machine_of(machine: EmulatedMachine) -> dict[str, Callable[[], object]]:
    """What it can try with the machine."""
    calls = machine.calls
    return {
        "reach its guest's grants": lambda: machine.state(Domid(1)),
        "reach another guest's grants": lambda: machine.state(Domid(2)),
        "bind to another guest's event channel": lambda: calls.bind_interdomain(Domid(2), Port(1)),
        "have a channel for another guest": lambda: calls.alloc_unbound(Domid(2)),
        "share pages with another guest": lambda: calls.share(Domid(2), 1),
        "end another guest": lambda: calls.destroy_domain(Domid(2)),  # type: ignore[union-attr]
        "have a store connection of its own": calls.xenstore,  # type: ignore[union-attr]
        "have to do with more domains": lambda: calls.restrict(1, 2),  # type: ignore[union-attr]
        "and then reach them": lambda: machine.state(Domid(2)),
    }


OWN, OTHER = "backend/vbd/1/51712", "backend/vbd/2/51712"


async def store_of(machine: EmulatedMachine) -> dict[str, str]:
    """What it can try in the store."""
    store = await machine.xenstore()
    tries: dict[str, Callable[[], Any]] = {
        "read its guest's disk": lambda: store.read(f"{OWN}/params"),
        "write its disk's state": lambda: store.write(f"{OWN}/state", "2"),
        "read its guest's frontend": lambda: store.ls("/local/domain/1/device/vbd"),
        "name another image": lambda: store.write(f"{OWN}/params", "aio:/etc/shadow"),
        "name it by an absolute path": lambda: store.write(f"/local/domain/0/{OWN}/params", "x"),
        "be allowed to write": lambda: store.write(f"{OWN}/mode", "w"),
        "let others write its nodes": lambda: store.set_perms(OWN, ["b0"]),
        "make a disk": lambda: store.mkdir("backend/vbd/1"),
        "write to its guest's frontend": lambda: store.write("/local/domain/1/x", "y"),
        "read another guest's disk": lambda: store.read(f"{OTHER}/params"),
        "watch another guest's disk": lambda: store.watch(OTHER),
        "read another guest's nodes": lambda: store.ls("/local/domain/2"),
        "list the guests": lambda: store.ls("/local/domain"),
        "write a node of the host": lambda: store.write("/local/domain/0/x", "y"),
        "remove another guest's disk": lambda: store.rm(OTHER),
        "end a guest": lambda: store.release(Domid(2)),
        "control the store": lambda: store.control("help"),
    }
    outcomes = {}
    for name, attempt in tries.items():
        try:
            await attempt()
            outcomes[name] = "done"
        except XenstoreError as error:
            outcomes[name] = error.code
    await store.close()
    return outcomes


def outcome_of(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    except XvdError as error:
        return type(error).__name__
    return "done"


def work(_order: Any, channel: socket.socket) -> int:
    """Be the worker."""
    _, machine = take(channel)
    assert isinstance(machine, EmulatedMachine)
    outcomes = {name: outcome_of(attempt) for name, attempt in SYSTEM.items()}
    outcomes |= asyncio.run(store_of(machine))
    outcomes |= {name: outcome_of(attempt) for name, attempt in machine_of(machine).items()}
    os.write(OUT[1], json.dumps(outcomes).encode() + b"\n")
    return 0


async def main(template: Template) -> None:
    """Be the host and the supervisor."""
    (PLACE / "host").mkdir()
    async with EmulatedHost() as host:
        await host.listen(PLACE / "host")
        machine = await asyncio.to_thread(connect, PLACE / "host", DOM0)
        store = await machine.xenstore()
        for guest in (1, 2):
            host.create_domain(Domid(guest))
            await create_guest(store, Domid(guest), f"guest{guest}")
        for guest, words in DISKS.items():
            for image, text in words.items():
                (PLACE / image).write_bytes(bytes(SIZE))
                await add(
                    store, Domid(guest), parse_xl_disk(f"{text},target={PLACE}/{image}"), DOM0
                )
        states = PLACE / "states"
        (states / "2").mkdir(parents=True)
        place = Place(machine, PLACE / "host", states, ["vbd"], Path("/dev/shm"))
        images = Images(store, ["vbd"], [], states, "granted-1")
        (PLACE / "named.img").write_bytes(bytes(SIZE))
        named = images.begin("1/51712", str(PLACE / "named.img"), moves=False)
        journal = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        journal.bind(str(PLACE / "journal"))
        (PLACE / "journal").chmod(0o666)
        worker = await template.spawn(None)
        take_back = await equip(
            worker, [1], place, confined=True, images=lambda: images.find([1]),
            withdrawals=images.withdrawals, limit=LogLimit(Domid(1)), allowance=Allowance(),
        )  # fmt: skip
        await asyncio.to_thread(os.read, OVER[0], 1)
        images.end(named, done=True)
        os.write(IS_OVER[1], b"x")
        await worker.ended
        await take_back()
        journal.close()
        free = await asyncio.to_thread(lambda: {n: outcome_of(SYSTEM[n]) for n in HARMLESS})
        await store.close()
        machine.close()
    tried = os.read(OUT[0], 1 << 16).decode()
    sys.stdout.write(tried + json.dumps(free) + "\n" + json.dumps(LOG) + "\n")


LOG: list[tuple[str, str]] = []
"""What was logged: its text, and which domain it is about."""


class Log(logging.Handler):
    """Notes what is logged, and is left to workers with the socket of a journal."""

    socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    def emit(self, record: logging.LogRecord) -> None:
        LOG.append((record.getMessage(), getattr(record, "xvd_domain", "")))

    def close(self) -> None:
        self.socket.close()
        super().close()


if __name__ == "__main__":
    logging.basicConfig(handlers=[Log()])
    one = Template(work)
    asyncio.run(main(one))
    one.close()
