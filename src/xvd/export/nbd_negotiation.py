# SPDX-License-Identifier: Apache-2.0
"""A client's negotiation: options in, replies out, until an export is chosen. No I/O.

Fixed newstyle only (NBD proto.md, "Fixed newstyle negotiation"). An export answers to its name, and
the first one to the empty name too. Where TLS is offered it is demanded: a client is told nothing
before it. An option that is unknown or malformed costs its own error reply
and nothing else; what makes the stream itself unreadable raises `Malformed`, which ends it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from xvd.export.nbd_protocol import (
    PAYLOAD_MAX,
    STRING_MAX,
    HandshakeFlag,
    Info,
    Malformed,
    Option,
    OptionReply,
    export_name_reply,
    info_block_size,
    info_export,
    info_text,
    meta_context,
    option_error,
    option_reply,
    parse_info_request,
    parse_meta_queries,
    parse_string,
    string,
)

OPTIONS_MAX: Final = 128
"""Options that one client may send: many times what any needs (nbdkit's limit)."""
OPTION_LENGTH_MAX: Final = 64 * 1024
"""Longest option, bytes: room for a name and a dozen context queries of full length."""

BASE_ALLOCATION: Final = "base:allocation"
BASE_ALLOCATION_ID: Final = 1


@dataclass(frozen=True, slots=True)
class Export:
    """What is offered: size in bytes, transmission flags, preferred block size in bytes.

    tells_holes: whether it is known where there is data.
    """

    name: str
    description: str
    size: int
    flags: int
    preferred_block_size: int
    tells_holes: bool = False


class Outcome(Enum):
    """What comes after the replies."""

    GO_ON = "more options"
    TRANSMISSION = "requests"
    TLS = "a TLS handshake, and more options within"
    END = "nothing: the connection is to be closed"


@dataclass(slots=True)
class Negotiation:
    """One client's. `exports` is asked anew for each option: a disk may change its size.

    tls: it is demanded, and has not begun.
    """

    exports: Callable[[], Sequence[Export]]
    tls: bool = False
    client_flags: int = 0
    structured: bool = False
    chosen: Export | None = None
    _context_for: str | None = None
    _options: int = field(default=0)

    @property
    def allocation(self) -> bool:
        """Whether base:allocation was negotiated for the export that was chosen."""
        return self.chosen is not None and self._context_for is not None

    def take(self, option: int, data: bytes) -> tuple[bytes, Outcome]:
        """Answer one option.

        Raises `Malformed` for a client that negotiates without end.
        """
        self._options += 1
        if self._options > OPTIONS_MAX:
            raise Malformed(f"more than {OPTIONS_MAX} options")
        try:
            return self._take(option, data)
        except Malformed as error:
            if option == Option.EXPORT_NAME:
                return b"", Outcome.END  # this option has no error reply
            return option_error(option, OptionReply.ERR_INVALID, str(error)), Outcome.GO_ON

    def _take(self, option: int, data: bytes) -> tuple[bytes, Outcome]:
        if self.tls and option != Option.ABORT:
            return self._before_tls(option, data)
        if option == Option.EXPORT_NAME:
            return self._export_name(data)
        if option == Option.ABORT:
            return option_reply(option, OptionReply.ACK), Outcome.END
        if option in (Option.INFO, Option.GO):
            return self._info(option, data)
        return self._others(option, data), Outcome.GO_ON

    def _before_tls(self, option: int, data: bytes) -> tuple[bytes, Outcome]:
        if option == Option.STARTTLS:
            _must_be_empty(data)
            self.tls = False
            return option_reply(option, OptionReply.ACK), Outcome.TLS
        if option == Option.EXPORT_NAME:
            return b"", Outcome.END  # this option has no error reply
        text = "this server demands TLS: begin it first"
        return option_error(option, OptionReply.ERR_TLS_REQD, text), Outcome.GO_ON

    def _find(self, name: str) -> Export | None:
        """The export that a client means who asks for `name`."""
        exports = self.exports()
        return next((it for it in exports if name in ("", it.name)), None)

    def _others(self, option: int, data: bytes) -> bytes:
        if option == Option.LIST:
            return self._list(data)
        if option == Option.STRUCTURED_REPLY:
            _must_be_empty(data)
            self.structured = True
            return option_reply(option, OptionReply.ACK)
        if option in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT):
            return self._contexts(option, data)
        text = "TLS is not offered, or has begun" if option == Option.STARTTLS else "unknown option"
        return option_error(option, OptionReply.ERR_UNSUP, text)

    def _choose(self, export: Export, name: str) -> None:
        self.chosen = export
        if self._context_for != name:
            self._context_for = None  # contexts hold for the name that they were asked for only

    def _export_name(self, data: bytes) -> tuple[bytes, Outcome]:
        name = _name(data)
        export = self._find(name)
        if export is None:
            return b"", Outcome.END
        self._choose(export, name)
        zeroes = not self.client_flags & HandshakeFlag.NO_ZEROES
        return export_name_reply(export.size, export.flags, zeroes=zeroes), Outcome.TRANSMISSION

    def _info(self, option: int, data: bytes) -> tuple[bytes, Outcome]:
        name, kinds = parse_info_request(data)
        export = self._find(name)
        if export is None:
            return _unknown(option, name), Outcome.GO_ON
        infos = [
            info_export(export.size, export.flags),
            info_block_size(1, export.preferred_block_size, PAYLOAD_MAX),
        ]
        if Info.NAME in kinds:
            infos.append(info_text(Info.NAME, export.name))
        if Info.DESCRIPTION in kinds and export.description:
            infos.append(info_text(Info.DESCRIPTION, export.description))
        replies = b"".join(option_reply(option, OptionReply.INFO, info) for info in infos)
        replies += option_reply(option, OptionReply.ACK)
        if option == Option.INFO:
            return replies, Outcome.GO_ON
        self._choose(export, name)
        return replies, Outcome.TRANSMISSION

    def _list(self, data: bytes) -> bytes:
        _must_be_empty(data)
        entries = (string(it.name) + it.description.encode() for it in self.exports())
        replies = [option_reply(Option.LIST, OptionReply.SERVER, entry) for entry in entries]
        return b"".join(replies) + option_reply(Option.LIST, OptionReply.ACK)

    def _contexts(self, option: int, data: bytes) -> bytes:
        name, queries = parse_meta_queries(data)
        if not self.structured:
            raise Malformed("metadata contexts need structured replies: ask for those first")
        export = self._find(name)
        if export is None:
            return _unknown(option, name)
        listing = option == Option.LIST_META_CONTEXT
        wanted = BASE_ALLOCATION in queries or (listing and (not queries or "base:" in queries))
        wanted = wanted and export.tells_holes
        if not listing:
            self._context_for = name if wanted else None
        context_id = 0 if listing else BASE_ALLOCATION_ID
        replies = b""
        if wanted:
            context = meta_context(context_id, BASE_ALLOCATION)
            replies = option_reply(option, OptionReply.META_CONTEXT, context)
        return replies + option_reply(option, OptionReply.ACK)


def _must_be_empty(data: bytes) -> None:
    if data:
        raise Malformed(f"{len(data)} bytes too many in an option")


def _name(data: bytes) -> str:
    if len(data) > STRING_MAX:
        raise Malformed(f"a name of {len(data)} bytes; {STRING_MAX} are allowed")
    return parse_string(data)


def _unknown(option: int, name: str) -> bytes:
    return option_error(option, OptionReply.ERR_UNKNOWN, f"there is no export {name!r} here")
