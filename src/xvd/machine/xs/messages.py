# SPDX-License-Identifier: Apache-2.0
"""The xenstore wire protocol as data: message types, framing, strings, paths and permissions.

A message is a 16-byte little-endian header (type, req_id, tx_id, len) and up to 4096 bytes of
payload, which for most types is a run of NUL-terminated strings. Nothing here does I/O: `Framer`
turns bytes that arrived in any portions into messages, and everything else is a plain function.
The numbers are those of Xen's ``xs_wire.h``; the payload shapes those of ``xenstore.txt``.
"""

import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final

from xvd.errors import XenstoreError
from xvd.types import DOMID_FIRST_RESERVED

PAYLOAD_MAX: Final = 4096
"""Bytes after the header; a longer claim costs the sender its connection (xs_wire.h)."""

REL_PATH_MAX: Final = 2048
"""Bytes in a path relative to a domain's own directory (xs_wire.h)."""

DOMID_SELF: Final = DOMID_FIRST_RESERVED
"""The domid that means "the caller" (xen.h)."""

HEADER: Final = struct.Struct("<4I")
"""type, req_id, tx_id, len (xs_wire.h: struct xsd_sockmsg)."""


class MessageType(IntEnum):
    """What a message asks or answers (xs_wire.h: enum xsd_sockmsg_type)."""

    CONTROL = 0
    DIRECTORY = 1
    READ = 2
    GET_PERMS = 3
    WATCH = 4
    UNWATCH = 5
    TRANSACTION_START = 6
    TRANSACTION_END = 7
    INTRODUCE = 8
    RELEASE = 9
    GET_DOMAIN_PATH = 10
    WRITE = 11
    MKDIR = 12
    RM = 13
    SET_PERMS = 14
    WATCH_EVENT = 15
    ERROR = 16
    IS_DOMAIN_INTRODUCED = 17
    RESUME = 18
    SET_TARGET = 19
    RESET_WATCHES = 21
    DIRECTORY_PART = 22
    GET_FEATURE = 23
    SET_FEATURE = 24
    GET_QUOTA = 25
    SET_QUOTA = 26
    INVALID = 0xFFFF


ERROR_NAMES: Final = frozenset(
    {
        *("EINVAL", "EACCES", "EEXIST", "EISDIR", "ENOENT", "ENOMEM", "ENOSPC", "EIO"),
        *("ENOTEMPTY", "ENOSYS", "EROFS", "EBUSY", "EAGAIN", "EISCONN", "E2BIG", "EPERM"),
    }
)
"""Every name that an ERROR reply may carry (xs_wire.h: xsd_errors)."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message; `type` stays a plain int because a peer may send any number."""

    type: int
    req_id: int
    tx_id: int
    payload: bytes

    def pack(self) -> bytes:
        """Header and payload as they go on the wire; the payload must fit `PAYLOAD_MAX`."""
        return HEADER.pack(self.type, self.req_id, self.tx_id, len(self.payload)) + self.payload


class Framer:
    """Bytes in, messages out; holds at most what was fed and not yet taken. One thread at a time.

    It stays out of the way of a partial message: `next_message` answers None until the rest came.
    """

    __slots__ = ("_buffer", "_start")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._start = 0

    def feed(self, data: bytes) -> None:
        """Append bytes that arrived."""
        if self._start:
            del self._buffer[: self._start]
            self._start = 0
        self._buffer += data

    def next_message(self) -> Message | None:
        """The next whole message, or None if it has not all arrived.

        Raises `XenstoreError` EIO if the header claims more than `PAYLOAD_MAX` bytes: where the
        next message would start is then unknown, so the connection cannot go on.
        """
        available = len(self._buffer) - self._start
        if available < HEADER.size:
            return None
        message_type, req_id, tx_id, length = HEADER.unpack_from(self._buffer, self._start)
        if length > PAYLOAD_MAX:
            raise XenstoreError("EIO", f"a header claims {length} bytes, at most {PAYLOAD_MAX} may")
        if available < HEADER.size + length:
            return None
        begin = self._start + HEADER.size
        self._start = begin + length
        return Message(message_type, req_id, tx_id, bytes(self._buffer[begin : self._start]))

    def __len__(self) -> int:
        return len(self._buffer) - self._start


def split_strings(payload: bytes) -> list[bytes]:
    """The NUL-terminated strings of a payload; what follows the last NUL is not one of them."""
    return payload.split(b"\0")[:-1]


def join_strings(strings: Iterable[bytes]) -> bytes:
    """Each string followed by a NUL."""
    return b"".join(string + b"\0" for string in strings)


def encode_text(text: str | bytes, what: str) -> bytes:
    """UTF-8 bytes of an argument that goes on the wire as a NUL-terminated string.

    Raises `XenstoreError` EINVAL if it contains a NUL, which would silently cut it.
    """
    data = text.encode() if isinstance(text, str) else text
    if b"\0" in data:
        raise XenstoreError("EINVAL", f"{what} {text!r} contains a NUL byte")
    return data


# The domain number is what sscanf's "%5u" takes: at most five characters, a sign among them.
_DOMAIN_PREFIX: Final = re.compile(r"/local/domain/(?:[0-9]{1,5}|-[0-9]{1,4})/")
_PATH_CHARACTERS: Final = re.compile(r"[A-Za-z0-9\-/_@]*")


def is_valid_path(path: str, path_max: int = REL_PATH_MAX) -> bool:
    """Whether an absolute path may name a node, as C xenstored decides it.

    It starts with ``/``, has no empty component, only ``A-Za-z0-9-/_@``, and what follows a
    ``/local/domain/<domid>/`` (or the whole, elsewhere) is at most `path_max` bytes.
    """
    if not path.startswith("/") or "//" in path or (path.endswith("/") and path != "/"):
        return False
    if not _PATH_CHARACTERS.fullmatch(path):
        return False
    if len(path) <= path_max:
        return True
    prefix = _DOMAIN_PREFIX.match(path)
    return prefix is not None and len(path) <= prefix.end() + path_max


def parent_path(path: str) -> str:
    """The path one level up; the root's is the root."""
    return path[: path.rindex("/")] or "/"


def child_path(path: str, name: str) -> str:
    """The path of a named child."""
    return f"/{name}" if path == "/" else f"{path}/{name}"


def domain_path(domid: int) -> str:
    """A domain's own directory, to which its relative paths are relative."""
    return f"/local/domain/{domid}"


class Access(IntFlag):
    """What a permission entry allows; the letters on the wire are n r w b."""

    NONE = 0
    READ = 1
    WRITE = 2
    BOTH = 3


_LETTER_TO_ACCESS: Final = {
    "n": Access.NONE,
    "r": Access.READ,
    "w": Access.WRITE,
    "b": Access.BOTH,
}
_ACCESS_TO_LETTER: Final = {access: letter for letter, access in _LETTER_TO_ACCESS.items()}


@dataclass(frozen=True, slots=True)
class Permission:
    """One entry of a node's list.

    The first entry names the owner, who may always do everything, and its access is what every
    domain not listed gets; each further entry is one domain's own access.
    """

    access: Access
    domid: int

    def __str__(self) -> str:
        return f"{_ACCESS_TO_LETTER[self.access]}{self.domid}"


# strtol with base 0, which must then stand at the string's end.
_C_NUMBER: Final = re.compile(r"[ \t\n\v\f\r]*([+-]?)(0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*)")
_C_DECIMAL: Final = re.compile(r"[ \t\n\v\f\r]*([+-]?[0-9]+)")
_LONG_MAX: Final = 2**63 - 1


def parse_permission(text: str) -> Permission:
    """``n0``, ``r1``, ``w0x10``... as C xenstored reads it.

    The number is C's: decimal, octal after ``0`` or hexadecimal after ``0x``, taken modulo 2^32.
    Raises `XenstoreError` EINVAL for any other letter or number.
    """
    access = _LETTER_TO_ACCESS.get(text[:1])
    number = _C_NUMBER.fullmatch(text, 1)
    if access is None or number is None:
        raise XenstoreError("EINVAL", f"{text!r} is not a permission: n, r, w or b and a domid")
    digits = number[2]
    base = 16 if digits[:2] in ("0x", "0X") else 8 if digits[0] == "0" else 10
    value = _clip_to_long(int(digits, base) * (-1 if number[1] == "-" else 1))
    return Permission(access, value & 0xFFFFFFFF)


def parse_c_uint(text: str) -> int:
    """A number as C's ``atoi`` reads it, taken modulo 2^32; 0 if the text starts with none."""
    number = _C_DECIMAL.match(text)
    return _clip_to_long(int(number[1])) & 0xFFFFFFFF if number else 0


def _clip_to_long(value: int) -> int:
    return max(-_LONG_MAX - 1, min(_LONG_MAX, value))
