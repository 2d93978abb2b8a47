# SPDX-License-Identifier: Apache-2.0
"""NBD on the wire: numbers, layouts, packing and parsing. Pure functions, no I/O.

The authority is the NBD project's protocol document (doc/proto.md, "proto" below); its spelling of
names is kept without the NBD_ prefix. Everything is big endian. What a client sends is parsed here
and nowhere else: what is malformed raises `Malformed` and is never read again.
"""

import errno
import os
import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final, NamedTuple

INIT_PASSWD: Final = 0x4E42444D41474943
"""Begins the server's greeting (proto, Newstyle negotiation): ``NBDMAGIC``."""
IHAVEOPT: Final = 0x49484156454F5054
"""Second word of the greeting, and begins every option."""
OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9
REQUEST_MAGIC: Final = 0x25609513
SIMPLE_REPLY_MAGIC: Final = 0x67446698
STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF

STRING_MAX: Final = 4096
"""Longest string on the wire, bytes (proto, Values)."""
PAYLOAD_MAX: Final = 32 * 1024 * 1024
"""Longest read or write, bytes: what clients assume that are told nothing (proto, Block sizes)."""

OPTION_HEADER: Final = struct.Struct(">QII")
REQUEST: Final = struct.Struct(">IHHQQI")
_OPTION_REPLY = struct.Struct(">QIII")
_SIMPLE_REPLY = struct.Struct(">IIQ")
_CHUNK = struct.Struct(">IHHQI")
_DATA_CHUNK = struct.Struct(">IHHQIQ")


class HandshakeFlag(IntFlag):
    """The server's flags in its greeting; the client answers with the same values."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class Option(IntEnum):
    """NBD_OPT_*: what a client may ask for while it negotiates."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10


class OptionReply(IntEnum):
    """NBD_REP_*: bit 31 marks the errors."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 1 << 31 | 1
    ERR_POLICY = 1 << 31 | 2
    ERR_INVALID = 1 << 31 | 3
    ERR_TLS_REQD = 1 << 31 | 5
    ERR_UNKNOWN = 1 << 31 | 6
    ERR_SHUTDOWN = 1 << 31 | 7
    ERR_TOO_BIG = 1 << 31 | 9


class Info(IntEnum):
    """NBD_INFO_*: kinds of information about an export."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class TransmissionFlag(IntFlag):
    """NBD_FLAG_*: what an export can do."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_FAST_ZERO = 1 << 11


class Command(IntEnum):
    """NBD_CMD_*: what a client may ask for once it uses an export."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CommandFlag(IntEnum):
    """NBD_CMD_FLAG_*; no IntFlag, whose operators are too slow for each request."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4


class Chunk(IntEnum):
    """NBD_REPLY_TYPE_*: kinds of structured reply; bit 15 marks the errors."""

    NONE = 0
    OFFSET_DATA = 1
    BLOCK_STATUS = 5
    ERROR = 1 << 15 | 1


DATA: Final = 0
HOLE: Final = 1 << 0 | 1 << 1
"""NBD_STATE_HOLE and NBD_STATE_ZERO: no space is taken, and zeros are read."""

CHUNK_DONE: Final = 1
"""NBD_REPLY_FLAG_DONE: no further chunk answers this request."""

FLAGS_OF: Final[dict[int, int]] = {
    Command.READ: CommandFlag.FUA | CommandFlag.DF,
    Command.WRITE: CommandFlag.FUA,
    Command.FLUSH: CommandFlag.FUA,
    Command.TRIM: CommandFlag.FUA,
    Command.CACHE: CommandFlag.FUA,
    Command.WRITE_ZEROES: CommandFlag.FUA | CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO,
    Command.BLOCK_STATUS: CommandFlag.FUA | CommandFlag.REQ_ONE,
}
"""The flags that each command may carry; FUA may stand anywhere and be ignored (proto, Command
flags)."""


class Malformed(ValueError):
    """What a client sent breaks the protocol; the text goes back to it if there is still a way."""


# ---- Negotiation: both directions ----


def greeting() -> bytes:
    """The server's first words."""
    flags = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
    return struct.pack(">QQH", INIT_PASSWD, IHAVEOPT, flags)


def parse_client_flags(data: bytes) -> HandshakeFlag:
    """The client's four bytes; an unknown bit means that we could not follow it."""
    (bits,) = struct.unpack(">I", data)
    if bits & ~int(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES):
        raise Malformed(f"unknown client flags {bits:#x}")
    return HandshakeFlag(bits)


def parse_option_header(data: bytes) -> tuple[int, int]:
    """(option, length of what follows)."""
    magic, option, length = OPTION_HEADER.unpack(data)
    if magic != IHAVEOPT:
        raise Malformed(f"an option begins with {magic:#x}")
    return option, length


def option_reply(option: int, reply: OptionReply, data: bytes = b"") -> bytes:
    """Pack one reply to an option."""
    return _OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, reply, len(data)) + data


def option_error(option: int, reply: OptionReply, text: str) -> bytes:
    """An error reply; `text` is for the person at the other end."""
    return option_reply(option, reply, text.encode()[:STRING_MAX])


def string(text: str) -> bytes:
    """A string with its length in front."""
    data = text.encode()
    return struct.pack(">I", len(data)) + data


class _Cursor:
    """Takes fields off an option's data; never beyond its end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, length: int) -> bytes:
        if length > len(self._data) - self._at:
            raise Malformed("an option is shorter than what it says it holds")
        self._at += length
        return self._data[self._at - length : self._at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def string(self) -> str:
        length = self.number(4)
        if length > STRING_MAX:
            raise Malformed(f"a string of {length} bytes; {STRING_MAX} are allowed")
        return parse_string(self.take(length))

    def end(self) -> None:
        if self._at != len(self._data):
            raise Malformed(f"{len(self._data) - self._at} bytes too many in an option")


def parse_string(data: bytes) -> str:
    """A string without its length: UTF-8, no NUL."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise Malformed("a string is not UTF-8") from None
    if "\0" in text:
        raise Malformed("a string holds a NUL")
    return text


def parse_info_request(data: bytes) -> tuple[str, list[int]]:
    """OPT_INFO and OPT_GO: (export name, kinds of information asked for)."""
    cursor = _Cursor(data)
    name = cursor.string()
    kinds = [cursor.number(2) for _ in range(cursor.number(2))]
    cursor.end()
    return name, kinds


def parse_meta_queries(data: bytes) -> tuple[str, list[str]]:
    """OPT_LIST_META_CONTEXT and OPT_SET_META_CONTEXT: (export name, queries)."""
    cursor = _Cursor(data)
    name = cursor.string()
    queries = []
    for _ in range(cursor.number(4)):
        queries.append(cursor.string())
    cursor.end()
    return name, queries


def export_name_reply(size: int, flags: int, *, zeroes: bool) -> bytes:
    """The answer to OPT_EXPORT_NAME, the old way to choose an export; nothing else follows."""
    return struct.pack(">QH", size, flags) + (bytes(124) if zeroes else b"")


def info_export(size: int, flags: int) -> bytes:
    """INFO_EXPORT: what OPT_EXPORT_NAME would answer."""
    return struct.pack(">HQH", Info.EXPORT, size, flags)


def info_text(kind: Info, text: str) -> bytes:
    """INFO_NAME or INFO_DESCRIPTION."""
    return struct.pack(">H", kind) + text.encode()


def info_block_size(minimum: int, preferred: int, maximum: int) -> bytes:
    """INFO_BLOCK_SIZE: bytes, powers of two."""
    return struct.pack(">HIII", Info.BLOCK_SIZE, minimum, preferred, maximum)


def meta_context(context_id: int, name: str) -> bytes:
    """The data of REP_META_CONTEXT."""
    return struct.pack(">I", context_id) + name.encode()


# ---- Transmission ----


class Request(NamedTuple):
    """A request's header as it stood on the wire; `length` and `offset` are bytes."""

    flags: int
    command: int
    cookie: int
    offset: int
    length: int


def simple_reply(cookie: int, error: int = 0) -> bytes:
    """A whole simple reply; read data follows it if there is no error."""
    return _SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, cookie)


def chunk(cookie: int, kind: Chunk, data: bytes = b"") -> bytes:
    """A whole structured reply of one chunk."""
    return _CHUNK.pack(STRUCTURED_REPLY_MAGIC, CHUNK_DONE, kind, cookie, len(data)) + data


def data_chunk_header(cookie: int, offset: int, length: int) -> bytes:
    """Pack what stands before `length` bytes of read data, which must be at least one."""
    return _DATA_CHUNK.pack(
        STRUCTURED_REPLY_MAGIC, CHUNK_DONE, Chunk.OFFSET_DATA, cookie, length + 8, offset
    )


def error_chunk(cookie: int, error: int, text: str) -> bytes:
    """A structured error with words for the person at the other end."""
    words = text.encode()[:STRING_MAX]
    return chunk(cookie, Chunk.ERROR, struct.pack(">IH", error, len(words)) + words)


@dataclass(frozen=True, slots=True)
class Extent:
    """One descriptor of a block status: `length` bytes with these flags."""

    length: int
    flags: int


def block_status_chunk(cookie: int, context_id: int, extents: list[Extent]) -> bytes:
    """The block status of one metadata context."""
    data = struct.pack(">I", context_id)
    data += b"".join(struct.pack(">II", extent.length, extent.flags) for extent in extents)
    return chunk(cookie, Chunk.BLOCK_STATUS, data)


# ---- Errors ----

_ERRORS: Final = {
    errno.EPERM: 1,
    errno.EACCES: 1,
    errno.EROFS: 1,
    errno.EIO: 5,
    errno.ENOMEM: 12,
    errno.EINVAL: 22,
    errno.ENOSPC: 28,
    errno.EDQUOT: 28,
    errno.EFBIG: 28,
    errno.EOVERFLOW: 75,
    errno.EOPNOTSUPP: 95,
    errno.ENODEV: 108,
    errno.ESHUTDOWN: 108,
}
_EIO: Final = 5


def error_number(error: OSError) -> int:
    """The protocol's number for a system's error (proto, Error values); EIO for any other."""
    return _ERRORS.get(error.errno or 0, _EIO)


def error_text(error: OSError) -> str:
    """Return the words for the client: the error's own."""
    return error.strerror or os.strerror(error.errno or errno.EIO)
