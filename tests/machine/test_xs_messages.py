# SPDX-License-Identifier: Apache-2.0
"""The wire format: numbers against Xen's own header, framing, paths, permissions."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xvd.errors import XenstoreError
from xvd.machine.xs import messages
from xvd.machine.xs.messages import (
    Access,
    Framer,
    Message,
    MessageType,
    Permission,
    encode_text,
    is_valid_path,
    join_strings,
    parent_path,
    parse_c_uint,
    parse_permission,
    split_strings,
)


@pytest.fixture
def xs_wire_h(requires_tool: Callable[[str], str]) -> str:
    return Path(requires_tool("/usr/include/xen/io/xs_wire.h")).read_text()


def test_a_message_packs_to_the_bytes_of_xs_wire_h() -> None:
    message = Message(MessageType.READ, 0x01020304, 0x0A, b"/a\0")
    packed = message.pack()
    assert packed.hex(" ") == "02 00 00 00 04 03 02 01 0a 00 00 00 03 00 00 00 2f 61 00"


def test_limits_and_error_names_are_those_of_xens_header(xs_wire_h: str) -> None:
    defines = dict(re.findall(r"#define XENSTORE_(\w+_MAX)\s+(\d+)", xs_wire_h))
    errors = set(re.findall(r"XSD_ERROR\((E\w+)\)", xs_wire_h))
    ours = {"PAYLOAD_MAX": messages.PAYLOAD_MAX, "REL_PATH_MAX": messages.REL_PATH_MAX}
    assert ours == {name: int(defines[name]) for name in ours}
    assert errors == messages.ERROR_NAMES


def test_types_are_those_of_xens_header(xs_wire_h: str) -> None:
    body = re.search(r"enum xsd_sockmsg_type\s*{(.*?)XS_TYPE_COUNT", xs_wire_h, re.S)
    assert body is not None
    names = re.findall(r"^\s+XS_(\w+)(?= =|,)", body[1], re.M)
    numbers = {MessageType[name] for name in names}
    assert numbers == {*range(20), 21, 22}


@given(st.lists(st.binary(max_size=40), max_size=6), st.data())
def test_messages_survive_any_portioning(payloads: list[bytes], data: st.DataObject) -> None:
    sent = [Message(index, index + 1, index + 2, load) for index, load in enumerate(payloads)]
    stream = b"".join(message.pack() for message in sent)
    framer = Framer()
    received = []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        framer.feed(stream[:size])
        stream = stream[size:]
        while (message := framer.next_message()) is not None:
            received.append(message)
    assert received == sent
    assert len(framer) == 0


def test_a_payload_of_4096_bytes_is_the_largest() -> None:
    framer = Framer()
    framer.feed(Message(2, 0, 0, bytes(4096)).pack())
    message = framer.next_message()
    assert message is not None
    assert len(message.payload) == 4096


def test_a_longer_claim_is_refused_before_its_payload_arrives() -> None:
    framer = Framer()
    framer.feed(messages.HEADER.pack(2, 0, 0, 4097))
    with pytest.raises(XenstoreError, match="EIO"):
        framer.next_message()


@given(st.lists(st.binary(max_size=8).filter(lambda text: b"\0" not in text)))
def test_strings_split_as_they_were_joined(strings: list[bytes]) -> None:
    assert split_strings(join_strings(strings) + b"tail") == strings


def test_a_nul_inside_an_argument_is_refused() -> None:
    with pytest.raises(XenstoreError, match="EINVAL"):
        encode_text("/a\0b", "the path")


@pytest.mark.parametrize(
    ("path", "valid"),
    [
        ("/", True),
        ("/a", True),
        ("/A-Z_0@9/b", True),
        ("", False),
        ("a", False),
        ("@releaseDomain", False),
        ("/a/", False),
        ("//", False),
        ("/a//b", False),
        ("/a.b", False),
        ("/a b", False),
        ("/é", False),
        ("/a\n", False),
        ("/" + "a" * 2047, True),
        ("/" + "a" * 2048, False),
        ("/local/domain/5/" + "a" * 2048, True),
        ("/local/domain/5/" + "a" * 2049, False),
        ("/local/domain/12345/" + "a" * 2048, True),
        ("/local/domain/123456/" + "a" * 2048, False),
        ("/local/domain/-123/" + "a" * 2048, True),
        ("/local/domain/x/" + "a" * 2048, False),
    ],
)
def test_which_paths_are_valid(path: str, valid: bool) -> None:
    assert is_valid_path(path) is valid


def test_path_relations() -> None:
    assert [parent_path(path) for path in ("/", "/a", "/a/b")] == ["/", "/", "/a"]


@pytest.mark.parametrize(
    ("text", "permission"),
    [
        ("n0", Permission(Access.NONE, 0)),
        ("r1", Permission(Access.READ, 1)),
        ("w32751", Permission(Access.WRITE, 32751)),
        ("b0x10", Permission(Access.BOTH, 16)),
        ("b010", Permission(Access.BOTH, 8)),
        ("r 1", Permission(Access.READ, 1)),
        ("r-1", Permission(Access.READ, 0xFFFFFFFF)),
    ],
)
def test_permissions_read_as_c_xenstored_reads_them(text: str, permission: Permission) -> None:
    assert parse_permission(text) == permission


@pytest.mark.parametrize("text", ["", "n", "x1", "n1x", "r08", "b0x", "r ", "1"])
def test_malformed_permissions_are_refused(text: str) -> None:
    with pytest.raises(XenstoreError, match="EINVAL"):
        parse_permission(text)


@given(st.sampled_from(list("nrwb")), st.integers(0, 0x7FEF))
def test_permissions_print_as_they_parse(letter: str, domid: int) -> None:
    assert str(parse_permission(f"{letter}{domid}")) == f"{letter}{domid}"


@pytest.mark.parametrize(
    ("text", "number"), [("12", 12), (" 12x", 12), ("x", 0), ("", 0), ("-1", 2**32 - 1)]
)
def test_numbers_read_as_atoi_reads_them(text: str, number: int) -> None:
    assert parse_c_uint(text) == number
