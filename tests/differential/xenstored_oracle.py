# SPDX-License-Identifier: Apache-2.0
"""Two xenstores to be asked the same: the real C xenstored behind xsshim.c, and ours.

Both offer channels, one per client: unix sockets for dom0, and for guests the shared ring with the
real one (this file is the guest's end of it) and a socket pair with ours.
"""

import asyncio
import fcntl
import mmap
import os
import select
import socket
import struct
import subprocess
import termios
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

from xvd.machine.emulated.xenstore import XenstoreStore
from xvd.machine.emulated.xenstore_domains import Quotas
from xvd.machine.xs.messages import Framer, Message, MessageType
from xvd.machine.xs.server import XenstoreServer
from xvd.types import Domid

TIMEOUT_S = 20.0
VIRQ_PORT = 1
RING_BYTES = 1024
REQ, RSP = 0, 1024
REQ_CONS, REQ_PROD, RSP_CONS, RSP_PROD = 512, 513, 514, 515  # in 32-bit words


def port_of(domid: int) -> int:
    return 100 + domid


class Channel(Protocol):
    def send(self, message: Message) -> None: ...

    def receive(self) -> Message: ...

    def close(self) -> None: ...


class SocketChannel:
    """A client's end of a stream socket."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.framer = Framer()
        sock.settimeout(TIMEOUT_S)

    def send(self, message: Message) -> None:
        self.sock.sendall(message.pack())

    def receive(self) -> Message:
        while (message := self.framer.next_message()) is None:
            data = self.sock.recv(65536)
            if not data:
                raise ConnectionError("the xenstore closed the connection")
            self.framer.feed(data)
        return message

    def close(self) -> None:
        self.sock.close()


class RingChannel:
    """A guest's end of its xenstore ring (xs_wire.h: struct xenstore_domain_interface)."""

    def __init__(self, oracle: "Oracle", domid: int) -> None:
        self.oracle = oracle
        self.port = port_of(domid)
        with (oracle.directory / f"domain-{domid}").open("r+b") as ring:
            self.page = mmap.mmap(ring.fileno(), mmap.PAGESIZE)
        # Whole words at a time: the other side would take half a written index for a broken ring.
        self.words = memoryview(self.page).cast("I")
        self.framer = Framer()

    def send(self, message: Message) -> None:
        data = message.pack()
        while data:
            produced = self.words[REQ_PROD]
            room = RING_BYTES - (produced - self.words[REQ_CONS]) % 2**32
            if room == 0:
                self.oracle.wait_notified()
                continue
            offset = produced % RING_BYTES
            chunk = data[: min(room, RING_BYTES - offset)]
            self.page[REQ + offset : REQ + offset + len(chunk)] = chunk
            self.words[REQ_PROD] = (produced + len(chunk)) % 2**32
            data = data[len(chunk) :]
            self.oracle.fire(self.port)

    def receive(self) -> Message:
        while (message := self.framer.next_message()) is None:
            consumed = self.words[RSP_CONS]
            available = (self.words[RSP_PROD] - consumed) % 2**32
            if available == 0:
                self.oracle.wait_notified()
                continue
            offset = consumed % RING_BYTES
            size = min(available, RING_BYTES - offset)
            self.framer.feed(self.page[RSP + offset : RSP + offset + size])
            self.words[RSP_CONS] = (consumed + size) % 2**32
            self.oracle.fire(self.port)
        return message

    def close(self) -> None:
        self.words.release()
        self.page.close()


class Oracle:
    """The C xenstored, in a process of its own."""

    def __init__(self, xenstored: str, shim: Path, directory: Path, quotas: Quotas) -> None:
        self.directory = directory
        directory.mkdir(parents=True)
        for pipe in ("ports", "notified"):
            os.mkfifo(directory / pipe)
        self.ports_fd = os.open(directory / "ports", os.O_RDWR)
        self.notified_fd = os.open(directory / "notified", os.O_RDWR | os.O_NONBLOCK)
        environment = os.environ | {
            "XENSTORED_RUNDIR": str(directory),
            "XSSHIM_DIR": str(directory),
            "LD_PRELOAD": str(shim),
        }
        options = {
            "-E": quotas.nodes,
            "-S": quotas.node_size,
            "-W": quotas.watches,
            "-t": quotas.transactions,
            "-A": quotas.permissions,
            "-M": quotas.path_max,
            "-Q": f"transaction-nodes={quotas.transaction_nodes}",
        }
        arguments = [text for option in options.items() for text in map(str, option)]
        self.log = (directory / "log").open("wb")
        # It tells that it listens by -P: with the pid on its standard output.
        self.process = subprocess.Popen(
            [xenstored, "-N", "-P", "-F", str(directory / "pid"), *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self.log,
        )
        assert self.process.stdout is not None
        if not self.process.stdout.readline():
            raise RuntimeError(f"xenstored did not start: {(directory / 'log').read_text()}")

    def fire(self, port: int) -> None:
        os.write(self.ports_fd, struct.pack("=I", port))

    def wait_notified(self) -> None:
        if not select.select([self.notified_fd], [], [], TIMEOUT_S)[0]:
            raise TimeoutError(f"xenstored is silent: {(self.directory / 'log').read_text()}")
        os.read(self.notified_fd, 65536)

    def create_domain(self, domid: int) -> None:
        (self.directory / f"domain-{domid}").write_bytes(bytes(4096))

    def kill_domain(self, domid: int) -> None:
        (self.directory / f"domain-{domid}").unlink()
        self.fire(VIRQ_PORT)
        # It takes one port in each round of its loop, so this one may stand behind others. Every
        # question answered is a round.
        with closing(self.connect_dom0()) as channel:
            while fcntl.ioctl(self.ports_fd, termios.FIONREAD, bytes(4)) != bytes(4):
                channel.send(Message(MessageType.GET_DOMAIN_PATH, 1, 0, b"0\0"))
                channel.receive()

    def connect_dom0(self) -> Channel:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(str(self.directory / "socket"))
        return SocketChannel(sock)

    def connect_guest(self, domid: int) -> Channel:
        return RingChannel(self, domid)

    def fate(self) -> str:
        """Whether it still runs, for a test that lost it."""
        return f"xenstored ended with {self.process.poll()}"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.log.close()
        os.close(self.ports_fd)
        os.close(self.notified_fd)


class Ours:
    """Our store and server, in a thread with its own event loop."""

    def __init__(self, directory: Path, quotas: Quotas) -> None:
        directory.mkdir(parents=True)
        self.path = directory / "socket"
        self.domids = {0}
        self.store = XenstoreStore(quotas, domain_exists=self.domids.__contains__)
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.server = self._call(self._start)

    def _call(self, function: Callable[[], Any]) -> Any:
        async def run() -> Any:
            result = function()
            return await result if asyncio.iscoroutine(result) else result

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(TIMEOUT_S)

    async def _start(self) -> XenstoreServer:
        server = XenstoreServer(self.store)
        await server.listen(self.path)
        return server

    def create_domain(self, domid: int) -> None:
        self._call(lambda: self.domids.add(domid))

    def kill_domain(self, domid: int) -> None:
        def kill() -> None:
            self.domids.discard(domid)
            self.store.check_domains()

        self._call(kill)

    def connect_dom0(self) -> Channel:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(str(self.path))
        return SocketChannel(sock)

    def connect_guest(self, domid: int) -> Channel:
        return SocketChannel(self._call(lambda: self.server.connect_local(Domid(domid))))

    def close(self) -> None:
        self._call(self.server.close)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


def build_shim(gcc: str, directory: Path) -> Path:
    """Compile xsshim.c; its warnings are errors."""
    shim = directory / "xsshim.so"
    source = Path(__file__).with_name("xsshim.c")
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(
        [gcc, *flags, "-o", shim, source, "-ldl"],
        check=True,
    )
    return shim
