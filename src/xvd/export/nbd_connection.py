# SPDX-License-Identifier: Apache-2.0
"""One NBD client: its negotiation, and then the life of its transmission.

The negotiation is a row of units, each a header of known length and perhaps a payload; `_pump`
takes as many as have arrived. When an export is chosen the socket goes to a compiled transmission
(transmission.pyx), which a queue's thread steps; this object hears how it ends.

A client cannot make us hold more than `REQUESTS_MAX` requests and `BYTES_MAX` bytes, of what it
sends and of what it does not read: beyond that we do not read from it.
"""

import asyncio
import logging
import socket
import ssl
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from xvd.export import nbd_protocol as nbd
from xvd.export.memory import ExportMemory
from xvd.export.nbd_negotiation import OPTION_LENGTH_MAX, Export, Negotiation, Outcome
from xvd.export.nbd_protocol import Malformed
from xvd.export.nbd_requests import ExportedDisk, Requests, Storage
from xvd.export.transmission import Transmission

logger = logging.getLogger(__name__)

REQUESTS_MAX: Final = 256
"""Requests of one client in progress; nbdcopy sends 64 at a time, fio as many as it is told."""
BYTES_MAX: Final = 2 * nbd.PAYLOAD_MAX
"""Bytes of data of one client's requests in progress."""

_SEND_BUFFER: Final = 1 << 20
"""Bytes of replies on their way to a local client, as far as the system allows: one that takes long
replies is woken less often, and so are we. TCP finds its own."""
_PIECE: Final = 64 * 1024
"""Bytes of the negotiation, and perhaps of what follows it, taken at a time."""


class Owner(Protocol):
    """The server, as its connections see it."""

    memory: ExportMemory
    count: Counter[str]
    patience_s: float

    def exports(self) -> Sequence[Export]:
        """Describe the disks to a client that arrives now."""

    def exported(self, name: str) -> tuple[ExportedDisk, Storage | None]:
        """The disk of that name, and its storage where it is at hand."""

    def secured(self, client: socket.socket, tls: ssl.SSLContext) -> socket.socket:
        """Do the server's part of TLS on a client's socket, which is the server's from now on; what
        is spoken within it goes through the socket that is returned."""

    def arrived(self, connection: "NbdConnection") -> bool:
        """Whether there is room for it."""

    def left(self, connection: "NbdConnection") -> None:
        """Its socket is closed and nothing of it is in progress."""


class NbdConnection:
    """One client, from its first byte on. Everything in the event loop's thread.

    sock: a stream that is ours from now on. tls: what is demanded of the client.
    """

    def __init__(
        self, owner: Owner, sock: socket.socket, tls: ssl.SSLContext | None = None
    ) -> None:
        self._owner = owner
        self._tls = tls
        self._securing = False  # TLS begins when the client has been told so
        self._disk: ExportedDisk | None = None
        self._loop = asyncio.get_running_loop()
        self._negotiation = Negotiation(owner.exports, tls is not None)
        self._socket = sock
        self._timer: asyncio.TimerHandle | None = None
        self._received = bytearray()
        self._unsent = bytearray()
        # A unit: its header's length, what to do with the header, and its payload on the way.
        self._header_length = 4
        self._on_header: Callable[[bytes], None] = self._client_flags
        self._option_name = 0
        self._payload_length: int | None = None
        self._chosen = False  # an export; what comes now is for the transmission
        self._transmission: Transmission | None = None
        self._requests: Requests | None = None
        self._ending = False
        self._gone = False
        self._arrive()

    @property
    def in_flight(self) -> int:
        """Requests in progress."""
        return 0 if self._transmission is None else self._transmission.in_progress

    @property
    def held_bytes(self) -> int:
        """Data of requests in progress, and replies that the client has not read."""
        return len(self._unsent) if self._transmission is None else self._transmission.held

    @property
    def idle_s(self) -> float | None:
        """Seconds for which a client that has chosen an export has asked for nothing; None while
        something of it is in progress, or before that, or when it is on its way out."""
        if self._ending or self._transmission is None or self._transmission.is_busy:
            return None
        return self._transmission.idle_s

    @property
    def ending(self) -> bool:
        """Whether its place is free for another."""
        return self._ending

    def holds_for_nothing(self, seconds: float) -> bool:
        """Whether it has kept memory for so long without sending or reading a byte."""
        transmission = self._transmission
        return (
            transmission is not None
            and transmission.awaits_client
            and transmission.idle_s >= seconds
        )

    def wake(self) -> None:
        """Let it be stepped: there may be memory for it, or it has some to give back."""
        if self._transmission is not None and self._disk is not None:
            self._disk.wake(self._transmission)

    def counters(self) -> dict[str, int]:
        """Return the counters of the transmission."""
        return {} if self._transmission is None else self._transmission.counters()

    # ---- Bytes of the negotiation ----

    def _arrive(self) -> None:
        """A client: greet it, or turn it away."""
        self._socket.setblocking(False)
        if self._socket.family == socket.AF_UNIX:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        else:
            # A client whose host has vanished is found out, in the system's time.
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if not self._owner.arrived(self):
            self._leave()
            return
        self._arm(self.abort)
        self._loop.add_reader(self._socket, self._readable)
        self._write(nbd.greeting())

    def _readable(self) -> None:
        try:
            data = self._socket.recv(_PIECE)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.abort()
            return
        if not data:
            self.finish()
            return
        self._received += data
        try:
            while not (self._ending or self._chosen or self._securing) and self._step():
                pass
        except Malformed as error:
            self._refuse(str(error))
            self.abort()

    def _write(self, data: bytes) -> None:
        self._unsent += data
        self._send()

    def _send(self) -> None:
        """Send what there is; then see whether that was all we had to say."""
        if self._gone:
            return
        try:
            del self._unsent[: self._socket.send(self._unsent)]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            self.abort()
            return
        if self._unsent:
            self._loop.add_writer(self._socket, self._send)
            return
        self._loop.remove_writer(self._socket)
        if self._ending:
            self._leave()
        elif self._chosen:
            self._transmit()
        elif self._securing:
            self._secure()

    # ---- Units of the negotiation ----

    def _step(self) -> bool:
        """Take one header or payload; False if there is none to take."""
        length, payload = self._header_length, self._payload_length
        if len(self._received) < (length if payload is None else payload):
            return False
        if payload is None:
            self._on_header(self._take(length))
        else:
            self._payload_length = None
            self._take_option(self._take(payload))
        return True

    def _take(self, length: int) -> bytes:
        data = bytes(self._received[:length])
        del self._received[:length]
        return data

    def _client_flags(self, header: bytes) -> None:
        self._negotiation.client_flags = nbd.parse_client_flags(header)
        self._header_length, self._on_header = nbd.OPTION_HEADER.size, self._option

    def _option(self, header: bytes) -> None:
        option, length = nbd.parse_option_header(header)
        if length > OPTION_LENGTH_MAX:
            text = f"an option of {length} bytes; {OPTION_LENGTH_MAX} are allowed"
            self._finish_with(nbd.option_error(option, nbd.OptionReply.ERR_TOO_BIG, text))
            return
        self._option_name, self._payload_length = option, length

    def _take_option(self, data: bytes) -> None:
        replies, outcome = self._negotiation.take(self._option_name, data)
        if outcome is Outcome.END:
            self._finish_with(replies)
            return
        if outcome is Outcome.TLS:
            if self._received:
                raise Malformed("something in plain text behind the beginning of TLS")
            self._loop.remove_reader(self._socket)
            self._securing = True
        if outcome is Outcome.TRANSMISSION:
            self._owner.count["handshakes"] += 1
            self._loop.remove_reader(self._socket)
            self._chosen = True
        self._write(replies)

    def _finish_with(self, replies: bytes) -> None:
        self._unsent += replies
        self.finish()

    def _refuse(self, reason: str) -> None:
        """The stream makes no sense any more: there is nobody to answer."""
        self._owner.count["malformed"] += 1
        logger.debug("nbd: closing a connection: %s", reason)

    def _secure(self) -> None:
        """Go on within TLS."""
        self._securing = False
        assert self._tls is not None
        self._socket = self._owner.secured(self._socket, self._tls)
        self._loop.add_reader(self._socket, self._readable)

    # ---- The transmission ----

    def _transmit(self) -> None:
        """Hand the socket over: whoever steps the transmission reads and writes it from here on."""
        self._disarm()
        self._transmission = Transmission(
            self._socket.detach(),
            structured=self._negotiation.structured,
            requests_max=REQUESTS_MAX,
            bytes_max=BYTES_MAX,
            payload_max=nbd.PAYLOAD_MAX,
            memory=self._owner.memory,
            received=bytes(self._received),
        )
        self._received.clear()
        assert self._negotiation.chosen is not None
        self._disk, storage = self._owner.exported(self._negotiation.chosen.name)
        self._requests = Requests(
            self._transmission, self._disk, self._negotiation, self._owner.count, self._heard,
            storage=storage,
        )  # fmt: skip

    def _heard(self, news: int) -> None:
        """How the transmission goes on."""
        if news & Transmission.MALFORMED:
            self._refuse("a request makes no sense")
        if news & Transmission.LEFT:
            self._requests = None
            self._leave()
        elif news & Transmission.OVER and not self._gone:
            self._ending = True
            self._arm(self._lose_patience)

    def _lose_patience(self) -> None:
        """Wait until the client has read its last replies, but not for ever."""
        if self.in_flight:
            self._arm(self._lose_patience)
        else:
            self.abort()

    # ---- Ending ----

    def _arm(self, then: Callable[[], None]) -> None:
        """Cut the client off if it keeps us waiting, in negotiation or in the end."""
        self._disarm()
        self._timer = self._loop.call_later(self._owner.patience_s, then)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _leave(self) -> None:
        """Give the counters to the server, once."""
        if self._gone:
            return
        self._gone = self._ending = True
        self._disarm()
        if self._transmission is None:
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
            self._socket.close()
        self._owner.count.update(self.counters())
        self._transmission = None
        self._owner.left(self)

    def finish(self) -> None:
        """Take no more; close when what is in progress is answered and the answers are read."""
        if self._ending:
            return
        self._ending = True
        if self._transmission is not None:
            self._transmission.finish()
            self.wake()
        else:
            self._loop.remove_reader(self._socket)
            self._arm(self.abort)
            self._send()

    def abort(self) -> None:
        """Close at once; what is on the disk finishes unheard."""
        self._ending = True
        if self._transmission is not None:
            self._transmission.cut()
            self.wake()
        else:
            self._leave()

    def cancel(self) -> None:
        """Close at once and wait for nothing: only when all clients are ended."""
        self.abort()
        if self._requests is not None:
            self._requests.cancel()
        self._leave()
