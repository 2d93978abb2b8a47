# SPDX-License-Identifier: Apache-2.0
"""What a client can ask of a store within a transaction or outside one, as data to be sent.

Paths may be relative to the domain's own. Every function raises `XenstoreError` EINVAL for a string
that no message can carry.
"""

from collections.abc import Iterable

from xvd.machine.xs.messages import MessageType, encode_text, join_strings

Request = tuple[MessageType, bytes]
"""A message's type and its payload."""


def read(path: str) -> Request:
    """Ask for a node's value."""
    return _of_path(MessageType.READ, path)


def write(path: str, value: str | bytes) -> Request:
    """Set a node's value, creating the node and those above it; text as UTF-8."""
    data = value.encode() if isinstance(value, str) else value
    return MessageType.WRITE, join_strings([encode_text(path, "the path")]) + data


def mkdir(path: str) -> Request:
    """Create a node, empty, and those above it; fine if it exists."""
    return _of_path(MessageType.MKDIR, path)


def rm(path: str) -> Request:
    """Remove a node and all below it; fine if only its parent exists."""
    return _of_path(MessageType.RM, path)


def directory(path: str) -> Request:
    """Ask for the children's names, as far as one answer holds them."""
    return _of_path(MessageType.DIRECTORY, path)


def directory_part(path: str, offset: int) -> Request:
    """Ask for the children's names from a byte of their list on."""
    strings = [encode_text(path, "the path"), str(offset).encode()]
    return MessageType.DIRECTORY_PART, join_strings(strings)


def get_perms(path: str) -> Request:
    """Ask for a node's permission list."""
    return _of_path(MessageType.GET_PERMS, path)


def set_perms(path: str, perms: Iterable[str]) -> Request:
    """Set a node's permission list; the first entry names the owner."""
    entries = [encode_text(entry, "the permission") for entry in perms]
    return MessageType.SET_PERMS, join_strings([encode_text(path, "the path"), *entries])


def _of_path(message_type: MessageType, path: str) -> Request:
    return message_type, join_strings([encode_text(path, "the path")])
