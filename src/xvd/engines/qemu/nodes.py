# SPDX-License-Identifier: Apache-2.0
"""From a URI to what QEMU calls a block node, and the schemes that there are of that kind."""

import errno
import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final
from urllib.parse import parse_qs, unquote, urlsplit

from xvd.engines.formats import FORMATS
from xvd.engines.identity import identity_of
from xvd.engines.interface import Opening
from xvd.errors import ConfigError, EngineError

NODE: Final = "disk"
"""The name of the node that is served, whatever is below it."""

Blockdev = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Nodes:
    """What a storage daemon opens. objects: what the node refers to by name. path: of an image, or
    empty."""

    blockdev: Blockdev
    objects: tuple[Blockdev, ...] = ()
    path: str = ""

    @property
    def identity(self) -> str:
        """One line that tells this storage from any other."""
        if not self.path:
            return json.dumps(self.blockdev, sort_keys=True)
        with opened(self.path) as fd:
            return f"{self.blockdev['driver']} in {identity_of(fd)}"


@contextmanager
def opened(path: str) -> Iterator[int]:
    """Open a file or a block device, to ask about it; `EngineError` for anything else."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise EngineError(error.errno or errno.EIO, error.strerror or "", path) from None
    try:
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise EngineError(errno.EINVAL, "neither a file nor a block device", path)
        yield fd
    finally:
        os.close(fd)


def file_node(path: str, how: Opening) -> Blockdev:
    """Return the node of a file or block device; `EngineError` where there is none."""
    with opened(path) as fd:
        is_device = stat.S_ISBLK(os.fstat(fd).st_mode)
    node: Blockdev = {
        "driver": "host_device" if is_device else "file",
        "filename": os.path.abspath(path),
        "aio": "io_uring",
    }
    if how.device_model:
        node["locking"] = "off"
    return node


def _goes_past_the_cache(path: str) -> bool:
    """Whether the file takes O_DIRECT, which QEMU insists on where it is told to."""
    with suppress(OSError):
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT))
        return True
    return False


def _with_node(rest: Blockdev, how: Opening) -> Blockdev:
    return {"node-name": NODE, "read-only": how.read_only, "discard": "unmap", **rest}


def image(driver: str, path: str, how: Opening) -> Nodes:
    """Return an image's node. Backing files are opened by what the image says of them."""
    below = file_node(path, how)
    cache = {"direct": _goes_past_the_cache(path)}
    return Nodes(_with_node({"driver": driver, "cache": cache, "file": below}, how), path=path)


def luks(rest: str, how: Opening) -> Nodes:
    """``luks:PATH,key-file=PATH``: the passphrase is all that the second file holds."""
    path, comma, key = rest.partition(",key-file=")
    if not comma or not key:
        raise ConfigError(f"luks:{rest}: where is its passphrase? write luks:PATH,key-file=PATH")
    if not os.path.isfile(key):
        raise ConfigError(f"luks:{path}: there is no key file {key}")
    nodes = image("luks", path, how)
    secret = {"qom-type": "secret", "id": "key", "file": os.path.abspath(key)}
    return Nodes(nodes.blockdev | {"key-secret": "key"}, (secret,), path)


def nbd(rest: str, how: Opening) -> Nodes:
    """``nbd:HOST[:PORT]/EXPORT``, also written ``nbd://HOST...``."""
    split = urlsplit(f"//{rest.removeprefix('//')}")
    if not split.hostname:
        raise ConfigError(f"nbd:{rest} names no host; write nbd:HOST:PORT/EXPORT")
    server = {"type": "inet", "host": split.hostname, "port": str(split.port or 10809)}
    return _nbd_node(server, split.path, how)


def nbd_unix(rest: str, how: Opening) -> Nodes:
    """``nbd+unix:///EXPORT?socket=PATH``."""
    split = urlsplit(rest)
    sockets = parse_qs(split.query).get("socket", [])
    if len(sockets) != 1:
        raise ConfigError(f"nbd+unix:{rest} names no socket; write nbd+unix:///EXPORT?socket=PATH")
    return _nbd_node({"type": "unix", "path": sockets[0]}, split.path, how)


def _nbd_node(server: Blockdev, path: str, how: Opening) -> Nodes:
    node = {
        "driver": "nbd",
        "server": server,
        "export": unquote(path.removeprefix("/")),
        "reconnect-delay": 1 << 31,  # seconds: a guest sees a delay, however long
    }
    return Nodes(_with_node(node, how))


def iscsi(rest: str, how: Opening) -> Nodes:
    """``iscsi://PORTAL/TARGET/LUN``."""
    portal, _, path = rest.removeprefix("//").partition("/")
    target, _, lun = path.rpartition("/")
    if not portal or not target or not lun.isdigit():
        raise ConfigError(f"iscsi:{rest} names no disk; write iscsi://PORTAL/TARGET/LUN")
    node = {
        "driver": "iscsi", "transport": "tcp", "portal": portal, "target": target, "lun": int(lun),
    }  # fmt: skip
    return Nodes(_with_node(node, how))


def nfs(rest: str, how: Opening) -> Nodes:
    """``nfs://HOST/PATH``."""
    host, slash, path = rest.removeprefix("//").partition("/")
    if not host or not slash or not path:
        raise ConfigError(f"nfs:{rest} names no file; write nfs://HOST/PATH")
    node = {"driver": "nfs", "server": {"type": "inet", "host": host}, "path": f"/{path}"}
    return Nodes(_with_node(node, how))


def https(rest: str, how: Opening) -> Nodes:
    """``https://HOST/PATH``, which is read-only."""
    node = {"driver": "https", "url": f"https:{rest}"}
    return Nodes(_with_node(node, how) | {"read-only": True})


def described(rest: str, how: Opening) -> Nodes:
    """``qemu:JSON``: an object as QMP's blockdev-add takes it."""
    try:
        node = json.loads(rest)
    except ValueError as error:
        raise ConfigError(f"qemu:{rest} is no JSON: {error}") from None
    if not isinstance(node, dict) or "driver" not in node:
        raise ConfigError(f"qemu:{rest} is no block node: an object with a driver")
    return Nodes({"discard": "unmap", **node, "node-name": NODE, "read-only": how.read_only})


_FILES: Final[dict[str, Callable[[str, Opening], Nodes]]] = {
    name: partial(image, row.driver)
    for known, row in FORMATS.items()
    if known != "luks"
    for name in {known: None, row.driver: None}
}
_HELP: Final = "an image in QEMU's format of that name"

SOURCES: Final[tuple[tuple[str, str, str, Callable[[str, Opening], Nodes]], ...]] = (
    *((name, f"{name}:PATH", _HELP, make) for name, make in _FILES.items()),
    ("luks", "luks:PATH,key-file=PATH", "an encrypted image", luks),
    ("nbd", "nbd:HOST:PORT/EXPORT", "an NBD export", nbd),
    ("nbd+unix", "nbd+unix:///EXPORT?socket=PATH", "the same, by a socket of this host", nbd_unix),
    ("iscsi", "iscsi://PORTAL/TARGET/LUN", "a disk of an iSCSI target", iscsi),
    ("nfs", "nfs://HOST/PATH", "a raw image on an NFS server", nfs),
    ("https", "https://HOST/PATH", "a raw image on a web server, read-only", https),
    ("qemu", "qemu:JSON", "any other block node of QEMU's", described),
)
"""Each scheme: its name, how it is written, what is then served, and its nodes."""
