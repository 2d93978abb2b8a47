# SPDX-License-Identifier: Apache-2.0
"""Each xenstore request: take its payload apart, ask the store, put the answer's together.

The idea to read it by: one function per message type, called with the connection, the payload and
the transaction it names (None for none), which returns the reply's payload or raises
`XenstoreError`; `answer` holds the checks that come before all of them. Payload shapes are those of
xenstore.txt.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from xvd.errors import XenstoreError
from xvd.machine.emulated.xenstore_connection import Connection
from xvd.machine.emulated.xenstore_control import control
from xvd.machine.emulated.xenstore_domains import OWNER, READ, WRITE, rights
from xvd.machine.emulated.xenstore_tree import Transaction
from xvd.machine.xs.messages import (
    DOMID_SELF,
    PAYLOAD_MAX,
    Message,
    MessageType,
    domain_path,
    join_strings,
    parent_path,
    parse_c_uint,
    split_strings,
)
from xvd.types import Domid

_OK: Final = b"OK\0"
_T: Final = MessageType

Handler = Callable[[Connection, bytes, Transaction | None], bytes]


def answer(connection: Connection, message: Message) -> bytes:
    """The payload of the reply to one request; `XenstoreError` for an ERROR reply.

    ENOSYS for a type that is no request, EACCES for one that is dom0's alone, ENOENT for a
    transaction that is not open.
    """
    handler = _HANDLERS.get(message.type)
    if handler is None:
        raise XenstoreError("ENOSYS", f"no request has type {message.type}")
    if message.type in _PRIVILEGED and connection.limited:
        raise XenstoreError("EACCES", "this is for dom0 alone")
    tx = None
    if message.tx_id and message.type not in _OUTSIDE_TRANSACTIONS:
        tx = connection.transactions.get(message.tx_id)
        if tx is None:
            raise XenstoreError("ENOENT", f"transaction {message.tx_id} is not open")
    return handler(connection, message.payload, tx)


def _one_string(payload: bytes) -> str:
    # Exactly one NUL, at the end.
    if payload.find(b"\0") != len(payload) - 1 or not payload:
        raise XenstoreError("EINVAL", "the payload is not one string")
    return payload[:-1].decode("latin-1")


def _strings(payload: bytes, count_min: int) -> list[str]:
    strings = [string.decode("latin-1") for string in split_strings(payload)]
    if len(strings) < count_min:
        raise XenstoreError("EINVAL", f"the payload has fewer than {count_min} strings")
    return strings


def _read(connection: Connection, payload: bytes, tx: Transaction | None) -> bytes:
    return connection.get_node(connection.canonical(_one_string(payload)), READ, tx).value


def _directory(connection: Connection, payload: bytes, tx: Transaction | None) -> bytes:
    path = connection.canonical(_one_string(payload))
    return connection.get_node(path, READ, tx).directory()


def _directory_part(connection: Connection, payload: bytes, tx: Transaction | None) -> bytes:
    strings = _strings(payload, 2)
    if len(strings) != 2:
        raise XenstoreError("EINVAL", "the payload is not a path and an offset")
    node = connection.get_node(connection.canonical(strings[0]), READ, tx)
    names = node.directory()
    offset = parse_c_uint(strings[1])
    generation = str(node.generation).encode() + b"\0"
    if offset >= len(names):
        return generation + b"\0"
    # Whole names only, and room for the empty one that tells the end.
    room = PAYLOAD_MAX - len(generation) - 1
    if len(names) - offset <= room:
        return generation + names[offset:] + b"\0"
    return generation + names[offset : names.rfind(b"\0", offset, offset + room) + 1]


def _get_perms(connection: Connection, payload: bytes, tx: Transaction | None) -> bytes:
    path = connection.canonical(_one_string(payload))
    perms = connection.get_node(path, READ, tx).perms
    return join_strings(str(entry).encode() for entry in perms)


def _write(connection: Connection, payload: bytes, tx: Transaction | None) -> bytes:
    name, found, value = payload.partition(b"\0")
    if not found:
        raise XenstoreError("EINVAL", "the payload is not a path and a value")
    store = connection.store
    path = connection.canonical(name.decode("latin-1"))
    try:
        node = connection.get_node(path, WRITE, tx)
    except XenstoreError as error:
        if error.code != "ENOENT":
            raise
        node = connection.create_node(path, value, tx)
    else:
        node = store.tree.write(path, replace(node, value=value), tx, connection.limited)
    store.fire(path, node.perms, tx)
    return _OK


def _mkdir(connection: Connection, payload: bytes, tx: Transaction | None) -> bytes:
    path = connection.canonical(_one_string(payload))
    try:
        connection.get_node(path, WRITE, tx)
    except XenstoreError as error:
        if error.code != "ENOENT":
            raise
        node = connection.create_node(path, b"", tx)
        connection.store.fire(path, node.perms, tx)
    return _OK


def _rm(connection: Connection, payload: bytes, tx: Transaction | None) -> bytes:
    path = connection.canonical(_one_string(payload))
    store = connection.store
    try:
        connection.get_node(path, WRITE, tx)
    except XenstoreError as error:
        # Gone already is as good as removed, if it could have been there.
        if error.code == "ENOENT" and store.tree.read(parent_path(path), tx) is not None:
            return _OK
        raise
    if path == "/":
        raise XenstoreError("EINVAL", "the root cannot be removed")
    if store.tree.read(parent_path(path), tx) is None:
        raise XenstoreError("EINVAL", f"{path} has no parent")
    try:
        store.remove_subtree(path, tx)
    except XenstoreError as error:
        raise XenstoreError("EIO", f"removing {path}: {error}") from error
    return _OK


def _set_perms(connection: Connection, payload: bytes, tx: Transaction | None) -> bytes:
    name, *texts = _strings(payload, 2)
    store = connection.store
    if connection.limited and len(texts) > store.quotas.permissions:
        raise XenstoreError("ENOSPC", f"a node may have {store.quotas.permissions} permissions")
    perms = store.domains.parse_perms(texts, store.tree.generation)
    if name.startswith("@"):
        special = store.special_perms.get(name)
        if special is None:
            raise XenstoreError("EINVAL", f"{name} is no special watch")
        if rights(connection.domain, special) & (WRITE | OWNER) != WRITE | OWNER:
            raise XenstoreError("EACCES", name)
        store.special_perms[name] = perms
        return _OK
    path = connection.canonical(name)
    node = connection.get_node(path, WRITE | OWNER, tx)
    if connection.limited and perms[0].domid != node.perms[0].domid:
        raise XenstoreError("EPERM", "only dom0 may give a node away")
    stored = store.tree.write(path, replace(node, perms=perms), tx, connection.limited)
    store.tree.count_node(node.perms[0].domid, -1, tx)
    store.tree.count_node(perms[0].domid, 1, tx)
    store.fire(path, stored.perms, tx, old_perms=node.perms)
    return _OK


def _watch(connection: Connection, payload: bytes, _tx: Transaction | None) -> bytes:
    strings = _strings(payload, 2)
    if len(strings) > 3:
        raise XenstoreError("EINVAL", "the payload is not a path, a token and a depth")
    depth = None
    if len(strings) == 3:
        depth = parse_c_uint(strings[2])
        if depth >= 2**31:
            raise XenstoreError("EINVAL", "a depth is 0 or more")
    connection.add_watch(strings[0], strings[1], depth)
    return _OK


def _unwatch(connection: Connection, payload: bytes, _tx: Transaction | None) -> bytes:
    strings = _strings(payload, 2)
    if len(strings) != 2:
        raise XenstoreError("EINVAL", "the payload is not a path and a token")
    watch = connection.watches.get((connection.canonical(strings[0]), strings[1]))
    if watch is None:
        raise XenstoreError("ENOENT", f"{strings[0]!r} is not watched with this token")
    connection.remove_watch(watch)
    return _OK


def _reset_watches(connection: Connection, _payload: bytes, _tx: Transaction | None) -> bytes:
    connection.reset()
    return _OK


def _transaction_start(connection: Connection, _payload: bytes, tx: Transaction | None) -> bytes:
    if tx is not None:
        raise XenstoreError("EBUSY", "transactions do not nest")
    return f"{connection.start_transaction().tx_id}\0".encode()


def _transaction_end(connection: Connection, payload: bytes, tx: Transaction | None) -> bytes:
    how = _one_string(payload)
    if how not in ("T", "F"):
        raise XenstoreError("EINVAL", "a transaction ends with T or F")
    if tx is None:
        raise XenstoreError("ENOENT", "no transaction was named")
    connection.end_transaction(tx, how == "T")
    return _OK


def _introduce(connection: Connection, payload: bytes, _tx: Transaction | None) -> bytes:
    domid, _gfn, port, *_ = _strings(payload, 3)
    if parse_c_uint(port) == 0:
        raise XenstoreError("EINVAL", "port 0 is no event channel")
    connection.store.introduce(Domid(parse_c_uint(domid)))
    return _OK


def _release(connection: Connection, payload: bytes, _tx: Transaction | None) -> bytes:
    connection.store.release(Domid(parse_c_uint(_one_string(payload))))
    return _OK


def _resume(connection: Connection, payload: bytes, _tx: Transaction | None) -> bytes:
    connection.store.resume(Domid(parse_c_uint(_one_string(payload))))
    return _OK


def _set_target(connection: Connection, payload: bytes, _tx: Transaction | None) -> bytes:
    domid, target, *_ = map(parse_c_uint, _strings(payload, 2))
    domains = connection.store.domains
    domain = domains.find_introduced(domid)
    domain.target = domains.find_introduced(target).domid
    return _OK


def _is_domain_introduced(connection: Connection, payload: bytes, _tx: Transaction | None) -> bytes:
    domid = parse_c_uint(_one_string(payload))
    domain = connection.store.domains.find(domid)
    introduced = domid == DOMID_SELF or (domain is not None and domain.introduced)
    return b"T\0" if introduced else b"F\0"


def _get_domain_path(_connection: Connection, payload: bytes, _tx: Transaction | None) -> bytes:
    return f"{domain_path(parse_c_uint(_one_string(payload)))}\0".encode()


def _control(connection: Connection, payload: bytes, _tx: Transaction | None) -> bytes:
    return control(connection.store, _strings(payload, 1)).encode("latin-1") + b"\0"


_HANDLERS: Final[dict[int, Handler]] = {
    _T.CONTROL: _control,
    _T.DIRECTORY: _directory,
    _T.READ: _read,
    _T.GET_PERMS: _get_perms,
    _T.WATCH: _watch,
    _T.UNWATCH: _unwatch,
    _T.TRANSACTION_START: _transaction_start,
    _T.TRANSACTION_END: _transaction_end,
    _T.INTRODUCE: _introduce,
    _T.RELEASE: _release,
    _T.GET_DOMAIN_PATH: _get_domain_path,
    _T.WRITE: _write,
    _T.MKDIR: _mkdir,
    _T.RM: _rm,
    _T.SET_PERMS: _set_perms,
    _T.IS_DOMAIN_INTRODUCED: _is_domain_introduced,
    _T.RESUME: _resume,
    _T.SET_TARGET: _set_target,
    _T.RESET_WATCHES: _reset_watches,
    _T.DIRECTORY_PART: _directory_part,
}

_PRIVILEGED: Final = frozenset(
    {_T.CONTROL, _T.INTRODUCE, _T.RELEASE, _T.IS_DOMAIN_INTRODUCED, _T.RESUME, _T.SET_TARGET}
)

_OUTSIDE_TRANSACTIONS: Final = frozenset({_T.WATCH, _T.UNWATCH})
