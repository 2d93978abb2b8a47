# SPDX-License-Identifier: Apache-2.0
"""The frontend's part of vhost-user: how a vhost-user-blk server is set up over its socket.

Of QEMU's docs/interop/vhost-user.rst, and of virtio 1.2, 5.2 for what a disk is. Every message asks
for a reply, so that what the server does not like is known at once.
"""

import array
import errno
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from xvd.errors import EngineError, describe
from xvd.types import RING_SECTOR_SIZE

_HEADER: Final = struct.Struct("=III")
_VERSION: Final = 1
_REPLY: Final = 4
_NEED_REPLY: Final = 8
_U64: Final = struct.Struct("=Q")
_STATE: Final = struct.Struct("=II")
_ADDRESSES: Final = struct.Struct("=IIQQQQ")
_REGIONS: Final = struct.Struct("=IIQQQQ")
_CONFIG_HEAD: Final = struct.Struct("=III")
_CONFIG: Final = struct.Struct("=QII4sIBBHIBBHIIIIIB3x")
_SAYS_NOTHING_S: Final = 30.0


class Request(IntEnum):
    """What is asked of a server."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    SET_MEM_TABLE = 5
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    SET_VRING_ENABLE = 18
    GET_CONFIG = 24


_ANSWERED: Final = {Request.GET_FEATURES, Request.GET_PROTOCOL_FEATURES, Request.GET_CONFIG}
"""Those that have an answer of their own."""


class Feature(IntEnum):
    """Bits of what a server and its disk can do."""

    BLK_RO = 5
    BLK_SIZE = 6
    BLK_FLUSH = 9
    BLK_TOPOLOGY = 10
    BLK_MQ = 12
    BLK_DISCARD = 13
    BLK_WRITE_ZEROES = 14
    EVENT_IDX = 29
    PROTOCOL = 30
    VERSION_1 = 32


_NEEDED: Final = (
    Feature.BLK_FLUSH, Feature.EVENT_IDX, Feature.PROTOCOL, Feature.VERSION_1
)  # fmt: skip
_WANTED: Final = sum(1 << bit for bit in Feature)
_PROTOCOL_MQ, _PROTOCOL_REPLY, _PROTOCOL_CONFIG = 0, 3, 9
_PROTOCOL: Final = 1 << _PROTOCOL_MQ | 1 << _PROTOCOL_REPLY | 1 << _PROTOCOL_CONFIG


@dataclass(frozen=True, slots=True)
class BlkConfig:
    """What a disk is, from its server's features and struct virtio_blk_config. All in bytes.

    discard_max: in one request; 0 where it cannot discard. zeroes_max: the same for zeros that are
    no data.
    """

    size: int
    block_size: int
    physical_block_size: int
    read_only: bool
    discard_max: int
    discard_granularity: int
    zeroes_max: int

    @classmethod
    def parse(cls, features: int, config: bytes) -> "BlkConfig":
        """Take the server's words apart."""
        capacity, _, _, _, block, exponent, *_, most, _, unit, zeroes, _, _ = _CONFIG.unpack(config)
        block_size = block if features >> Feature.BLK_SIZE & 1 else RING_SECTOR_SIZE
        topology = features >> Feature.BLK_TOPOLOGY & 1
        discards = features >> Feature.BLK_DISCARD & 1
        return cls(
            size=capacity * RING_SECTOR_SIZE,
            block_size=block_size,
            physical_block_size=block_size << exponent if topology else block_size,
            read_only=bool(features >> Feature.BLK_RO & 1),
            discard_max=most * RING_SECTOR_SIZE if discards else 0,
            discard_granularity=unit * RING_SECTOR_SIZE if discards else 0,
            zeroes_max=zeroes * RING_SECTOR_SIZE if features >> Feature.BLK_WRITE_ZEROES & 1 else 0,
        )


def _cannot(text: str) -> EngineError:
    return EngineError(errno.EPROTO, f"the vhost-user server {text}")


def _gone(text: str) -> EngineError:
    return EngineError(errno.ENOTCONN, f"the vhost-user server does not answer: {text}")


class Session:
    """A server, spoken to over a connected socket, which is closed with this.

    Raises `EngineError`: ENOTCONN where it goes away or says nothing, EPROTO where it cannot do
    what is needed.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        sock.settimeout(_SAYS_NOTHING_S)
        self._replies = False

    def begin(self) -> BlkConfig:
        """Agree on features; what the disk is."""
        features = self._ask_u64(Request.GET_FEATURES)
        if missing := [bit.name for bit in _NEEDED if not features >> bit & 1]:
            raise _cannot(f"has no {', '.join(missing)}")
        protocol = self._ask_u64(Request.GET_PROTOCOL_FEATURES)
        if _PROTOCOL & ~protocol:
            raise _cannot(f"has only the protocol features {protocol:#x}")
        self._tell(Request.SET_PROTOCOL_FEATURES, _U64.pack(_PROTOCOL))
        self._replies = True
        self._tell(Request.SET_OWNER)
        self._tell(Request.SET_FEATURES, _U64.pack(features & _WANTED))
        asked = _CONFIG_HEAD.pack(0, _CONFIG.size, 0) + bytes(_CONFIG.size)
        answer = self._ask(Request.GET_CONFIG, asked)
        return BlkConfig.parse(features, answer[_CONFIG_HEAD.size :])

    def share(self, fd: int, size: int, address: int) -> None:
        """Give it memory, the first `size` bytes of a file, to be called by addresses from there
        on."""
        self._tell(Request.SET_MEM_TABLE, _REGIONS.pack(1, 0, address, size, address, 0), [fd])

    def start_queue(
        self, index: int, entries: int, address: int, layout: Sequence[int], fds: Sequence[int]
    ) -> None:
        """Let it serve a virtqueue from its beginning.

        layout: where from `address` on the descriptors, the available and the used ring lie.
        fds: the eventfds by which it is kicked, and calls.
        """
        descriptors, available, used = (address + offset for offset in layout)
        kick, call = fds
        self._tell(Request.SET_VRING_NUM, _STATE.pack(index, entries))
        self._tell(Request.SET_VRING_BASE, _STATE.pack(index, 0))
        addresses = _ADDRESSES.pack(index, 0, descriptors, used, available, 0)
        self._tell(Request.SET_VRING_ADDR, addresses)
        self._tell(Request.SET_VRING_CALL, _U64.pack(index), [call])
        self._tell(Request.SET_VRING_KICK, _U64.pack(index), [kick])
        self._tell(Request.SET_VRING_ENABLE, _STATE.pack(index, 1))

    def close(self) -> None:
        """Let the server go."""
        self._sock.close()

    # ---- Messages ----

    def _tell(self, request: Request, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        self._send(request, payload, fds)
        if self._replies:
            (status,) = _U64.unpack(self._receive(request))
            if status:
                raise _cannot(f"refuses {request.name} ({status})")

    def _ask(self, request: Request, payload: bytes = b"") -> bytes:
        self._send(request, payload, ())
        return self._receive(request)

    def _ask_u64(self, request: Request) -> int:
        (value,) = _U64.unpack(self._ask(request))
        return int(value)

    def _send(self, request: Request, payload: bytes, fds: Sequence[int]) -> None:
        flags = _VERSION
        if self._replies and request not in _ANSWERED:
            flags |= _NEED_REPLY
        message = _HEADER.pack(request, flags, len(payload)) + payload
        passed = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self._sock.sendmsg([message], passed)
        except OSError as error:
            raise _gone(describe(error)) from None

    def _receive(self, request: Request) -> bytes:
        number, flags, size = _HEADER.unpack(self._read(_HEADER.size))
        if number != request or not flags & _REPLY or size > 1024:
            raise _cannot(f"answers {request.name} by {number}")
        return self._read(size)

    def _read(self, size: int) -> bytes:
        parts = b""
        while len(parts) < size:
            try:
                part = self._sock.recv(size - len(parts))
            except OSError as error:
                raise _gone(describe(error)) from None
            if not part:
                raise _gone("it has closed the connection")
            parts += part
        return parts
