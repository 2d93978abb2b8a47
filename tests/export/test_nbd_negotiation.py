# SPDX-License-Identifier: Apache-2.0
"""Every option, right and wrong, against the negotiation as a value."""

import struct
from dataclasses import replace

import pytest

from xvd.export.nbd_negotiation import OPTIONS_MAX, Export, Negotiation, Outcome
from xvd.export.nbd_protocol import Malformed, greeting, parse_client_flags

EXPORT = Export("disk", "a test", 1 << 20, 0x0145, 4096, tells_holes=True)
EXPORT_NAME, ABORT, LIST, STARTTLS = 1, 2, 3, 5
INFO, GO, STRUCTURED, LIST_META, SET_META = range(6, 11)
ACK, SERVER, REP_INFO, META = 1, 2, 3, 4
UNSUP, INVALID, UNKNOWN = (1 << 31 | n for n in (1, 3, 6))


def text(value: str) -> bytes:
    return struct.pack(">I", len(value)) + value.encode()


def queries(*names: str, export: str = "") -> bytes:
    return text(export) + struct.pack(">I", len(names)) + b"".join(text(name) for name in names)


def take(negotiation: Negotiation, option: int, data: bytes = b"") -> list[tuple[int, bytes]]:
    """The replies as (type, data)."""
    stream, _ = negotiation.take(option, data)
    replies = []
    while stream:
        magic, about, kind, length = struct.unpack(">QIII", stream[:20])
        assert (magic, about) == (0x3E889045565A9, option)
        replies.append((kind, stream[20 : 20 + length]))
        stream = stream[20 + length :]
    return replies


@pytest.fixture
def negotiation() -> Negotiation:
    return Negotiation(lambda: [EXPORT])


@pytest.fixture
def structured(negotiation: Negotiation) -> Negotiation:
    negotiation.take(STRUCTURED, b"")
    return negotiation


def test_greeting_bytes() -> None:
    assert greeting() == b"NBDMAGICIHAVEOPT\0\3"


def test_unknown_client_flags_end_the_connection() -> None:
    with pytest.raises(Malformed):
        parse_client_flags(struct.pack(">I", 4))


@pytest.mark.parametrize("name", ["", "disk"])
def test_go_chooses_the_export_by_its_name_and_the_empty_one(
    negotiation: Negotiation, name: str
) -> None:
    _, outcome = negotiation.take(GO, text(name) + b"\0\0")
    assert (outcome, negotiation.chosen) == (Outcome.TRANSMISSION, EXPORT)


def test_go_tells_size_flags_and_block_sizes(negotiation: Negotiation) -> None:
    replies = take(negotiation, GO, text("") + b"\0\0")
    assert replies == [
        (REP_INFO, struct.pack(">HQH", 0, 1 << 20, 0x0145)),
        (REP_INFO, struct.pack(">HIII", 3, 1, 4096, 32 << 20)),
        (ACK, b""),
    ]


def test_info_tells_name_and_description_when_asked_and_chooses_nothing(
    negotiation: Negotiation,
) -> None:
    replies = take(negotiation, INFO, text("") + struct.pack(">HHH", 2, 1, 2))
    assert (REP_INFO, b"\0\1disk") in replies
    assert (REP_INFO, b"\0\2a test") in replies
    assert negotiation.chosen is None


@pytest.mark.parametrize("option", [INFO, GO])
def test_unknown_name_is_an_error_and_negotiation_goes_on(
    negotiation: Negotiation, option: int
) -> None:
    assert take(negotiation, option, text("other") + b"\0\0")[0][0] == UNKNOWN
    assert negotiation.take(GO, text("disk") + b"\0\0")[1] is Outcome.TRANSMISSION


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0\5disk\0\0",
        text("disk"),
        text("disk") + b"\0\2\0\0",
        text("disk") + b"\0\0more",
        b"\xff\xff\xff\xff\0\0",
        text("a\0b") + b"\0\0",
        b"\0\0\0\1\xff\0\0",
        text("x" * 4097) + b"\0\0",
    ],
)
def test_malformed_go_is_invalid_and_negotiation_goes_on(
    negotiation: Negotiation, data: bytes
) -> None:
    stream, outcome = negotiation.take(GO, data)
    assert struct.unpack(">I", stream[12:16]) == (INVALID,)
    assert outcome is Outcome.GO_ON


@pytest.mark.parametrize(("flags", "padding"), [(0, 124), (2, 0)])
def test_export_name_pads_unless_told_not_to(
    negotiation: Negotiation, flags: int, padding: int
) -> None:
    negotiation.client_flags = flags
    reply, outcome = negotiation.take(EXPORT_NAME, b"disk")
    assert reply == struct.pack(">QH", 1 << 20, 0x0145) + bytes(padding)
    assert outcome is Outcome.TRANSMISSION


@pytest.mark.parametrize("name", [b"other", b"\xff", b"x" * 4097])
def test_bad_export_name_ends_the_connection(negotiation: Negotiation, name: bytes) -> None:
    assert negotiation.take(EXPORT_NAME, name) == (b"", Outcome.END)


def test_list_names_the_export_with_its_description(negotiation: Negotiation) -> None:
    assert take(negotiation, LIST) == [(SERVER, text("disk") + b"a test"), (ACK, b"")]


def test_list_with_data_is_invalid(negotiation: Negotiation) -> None:
    assert take(negotiation, LIST, b"x")[0][0] == INVALID


def test_abort_is_acknowledged_and_ends(negotiation: Negotiation) -> None:
    stream, outcome = negotiation.take(ABORT, b"")
    assert struct.unpack(">I", stream[12:16]) == (ACK,)
    assert outcome is Outcome.END


@pytest.mark.parametrize("option", [STARTTLS, 4, 11, 12345, 0xFFFFFFFF])
def test_tls_and_unknown_options_are_unsupported(negotiation: Negotiation, option: int) -> None:
    assert take(negotiation, option)[0][0] == UNSUP


@pytest.mark.parametrize("asked", [[], ["base:"], ["base:allocation"], ["x:y", "base:allocation"]])
def test_listing_contexts(structured: Negotiation, asked: list[str]) -> None:
    assert take(structured, LIST_META, queries(*asked)) == [
        (META, b"\0\0\0\0base:allocation"),
        (ACK, b""),
    ]


@pytest.mark.parametrize("asked", [["qemu:"], ["qemu:dirty-bitmap:x"], ["base"]])
def test_listing_contexts_of_others_finds_none(structured: Negotiation, asked: list[str]) -> None:
    assert take(structured, LIST_META, queries(*asked)) == [(ACK, b"")]


@pytest.mark.parametrize("option", [LIST_META, SET_META])
def test_where_it_is_not_known_where_data_lies_there_is_no_context(option: int) -> None:
    negotiation = Negotiation(lambda: [replace(EXPORT, tells_holes=False)])
    negotiation.take(STRUCTURED, b"")
    assert take(negotiation, option, queries("base:allocation")) == [(ACK, b"")]
    negotiation.take(GO, text("") + b"\0\0")
    assert not negotiation.allocation


def test_setting_the_context_makes_block_status_usable(structured: Negotiation) -> None:
    assert take(structured, SET_META, queries("base:allocation")) == [
        (META, b"\0\0\0\1base:allocation"),
        (ACK, b""),
    ]
    structured.take(GO, text("") + b"\0\0")
    assert structured.allocation


@pytest.mark.parametrize("asked", [[], ["base:"], ["other:context"]])
def test_setting_what_is_no_context_sets_none(structured: Negotiation, asked: list[str]) -> None:
    structured.take(SET_META, queries("base:allocation"))
    assert take(structured, SET_META, queries(*asked)) == [(ACK, b"")]
    structured.take(GO, text("") + b"\0\0")
    assert not structured.allocation


def test_contexts_hold_for_the_name_they_were_asked_for(structured: Negotiation) -> None:
    structured.take(SET_META, queries("base:allocation", export="disk"))
    structured.take(GO, text("") + b"\0\0")
    assert not structured.allocation


@pytest.mark.parametrize("option", [LIST_META, SET_META])
def test_contexts_need_structured_replies(negotiation: Negotiation, option: int) -> None:
    assert take(negotiation, option, queries("base:allocation"))[0][0] == INVALID


@pytest.mark.parametrize("option", [LIST_META, SET_META])
def test_contexts_of_an_unknown_export(structured: Negotiation, option: int) -> None:
    assert take(structured, option, queries("base:allocation", export="x"))[0][0] == UNKNOWN


def test_more_queries_announced_than_sent_is_invalid(structured: Negotiation) -> None:
    data = text("") + struct.pack(">I", 0xFFFFFFFF) + text("base:allocation")
    assert take(structured, SET_META, data)[0][0] == INVALID


def test_negotiating_without_end_is_ended(negotiation: Negotiation) -> None:
    for _ in range(OPTIONS_MAX):
        negotiation.take(LIST, b"")
    with pytest.raises(Malformed):
        negotiation.take(LIST, b"")


# ---- Several exports ----

OTHER = Export("other", "", 2 << 20, 0x0145, 512)


@pytest.fixture
def several() -> Negotiation:
    return Negotiation(lambda: [EXPORT, OTHER])


@pytest.mark.parametrize(("name", "export"), [("", EXPORT), ("disk", EXPORT), ("other", OTHER)])
def test_the_empty_name_is_the_first_exports(
    several: Negotiation, name: str, export: Export
) -> None:
    _, outcome = several.take(GO, text(name) + bytes(2))

    assert (several.chosen, outcome) == (export, Outcome.TRANSMISSION)


def test_every_export_is_listed(several: Negotiation) -> None:
    listed = [(SERVER, text("disk") + b"a test"), (SERVER, text("other")), (ACK, b"")]

    assert take(several, LIST) == listed


# ---- TLS ----

TLS_REQD = 1 << 31 | 5


@pytest.fixture
def secured() -> Negotiation:
    return Negotiation(lambda: [EXPORT], tls=True)


@pytest.mark.parametrize(
    ("option", "data"), [(LIST, b""), (GO, text("disk") + bytes(2)), (STRUCTURED, b""), (99, b"")]
)
def test_before_tls_nothing_is_told(secured: Negotiation, option: int, data: bytes) -> None:
    [(kind, words)] = take(secured, option, data)

    assert (kind, words) == (TLS_REQD, b"this server demands TLS: begin it first")
    assert not secured.structured


def test_before_tls_the_old_way_to_choose_ends_the_connection(secured: Negotiation) -> None:
    assert secured.take(EXPORT_NAME, b"disk") == (b"", Outcome.END)


def test_before_tls_a_client_may_leave(secured: Negotiation) -> None:
    _, outcome = secured.take(ABORT, b"")

    assert outcome is Outcome.END


def test_tls_begins_once(secured: Negotiation) -> None:
    _, outcome = secured.take(STARTTLS, b"")

    assert outcome is Outcome.TLS
    assert [kind for kind, _ in take(secured, STARTTLS)] == [UNSUP]
    assert [kind for kind, _ in take(secured, LIST)] == [SERVER, ACK]


def test_tls_begins_with_nothing_behind_its_name(secured: Negotiation) -> None:
    assert [kind for kind, _ in take(secured, STARTTLS, b"x")] == [INVALID]
    assert secured.tls
