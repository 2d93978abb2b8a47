# SPDX-License-Identifier: Apache-2.0
"""xapi's calls of a datapath plugin (SMAPIv3, API 5.0), for storage that `xvd backend` serves.

xapi runs a program for each call, so what has to be known in the next one is kept in files: one for
each use of a volume, from attach to detach. xenopsd writes the disk's nodes by what attach answers.
Sources: xen-api's ocaml/xapi-storage (the interface), ocaml/xapi-storage-script (how it is called),
ocaml/xenopsd/xc (what becomes of the answer).
"""

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import unquote

from xvd.blkif.assignment import STORAGE, parse_xl_params
from xvd.engines.uri import Look, examine
from xvd.errors import ConfigError, EngineError, PeerClosed, XvdError, describe
from xvd.files import create_own, open_own, own_directory, remove, remove_empty

SCHEME: Final = "xvd"
"""The plugin's directory has this name, and a volume's URI begins with it."""

TEXT_MAX: Final = 2048
"""Characters of a storage's text: a node of xenstore takes little more."""

BEGIN_S: Final = 10.0
"""How long attach and activate wait for a backend that is just being restarted."""
LET_GO_S: Final = 60.0
"""How long deactivate waits for the backend to have written everything and closed the storage."""
_AGAIN_S: Final = 0.05

_TAP: Final = "vbd3"
"""The kind to take where a backend serves several: no driver of Linux claims its disks."""


class Code(StrEnum):
    """What kind of error it is, for programs; the text beside it is for people."""

    BAD_CALL = "XVD_BAD_CALL"
    BAD_URI = "XVD_BAD_URI"
    NO_STORAGE = "XVD_NO_STORAGE"
    READ_ONLY = "XVD_READ_ONLY"
    NOT_ATTACHED = "XVD_NOT_ATTACHED"
    IN_USE = "XVD_IN_USE"
    NO_BACKEND = "XVD_NO_BACKEND"
    NOT_PERSISTENT = "XVD_NOT_PERSISTENT"
    UNIMPLEMENTED = "Unimplemented"


class Fault(XvdError):
    """A call that fails: a code, and a text that names the volume and the remedy."""

    def __init__(self, code: Code, text: str) -> None:
        super().__init__(text)
        self.code = code


class Backend(Protocol):
    """The daemon that is to serve the disks."""

    async def kinds(self) -> list[str]:
        """Return the kinds of backend that it serves; raises `PeerClosed` where none runs."""

    async def images(self, domid: int) -> list[str]:
        """Return what each disk of a guest is open on; of a daemon that is dead, nothing.

        Raises `PeerClosed` for one that does not answer.
        """


class Activation(StrEnum):
    """What a use of a volume has been activated for."""

    NONE = ""
    READING = "read-only"
    WRITING = "read-write"


@dataclass(frozen=True, slots=True)
class Use:
    """A volume that is attached for a domain. domain: xapi's word; of a guest, its number."""

    uri: str
    domain: str
    kind: str
    activation: Activation = Activation.NONE


def storage_of(uri: str) -> str:
    """Return the storage behind a volume's URI: ``xvd:qcow2:/a%20b`` is ``qcow2:/a b``.

    Raises `Fault` for a URI that is not the plugin's, or that a node could not hold.
    """
    scheme, colon, text = uri.partition(":")
    if not colon or scheme.lower() != SCHEME or not text or " " in uri:
        raise Fault(
            Code.BAD_URI,
            f"{uri!r} is no URI of this plugin: write {SCHEME}:STORAGE, with a path from the root "
            f"or any other storage of xvd, as {SCHEME}:qcow2:/images/a.qcow2, and %20 for a space",
        )
    if text.startswith("//"):
        text = text[2:]
        if not text.startswith("/"):
            raise Fault(Code.BAD_URI, f"{uri!r} names a host; write {SCHEME}:///PATH")
    text = unquote(text, encoding="latin-1")
    if len(text) > TEXT_MAX or not text.isascii() or not text.isprintable():
        raise Fault(
            Code.BAD_URI,
            f"{uri!r}: a disk's nodes hold printable ASCII of at most {TEXT_MAX} characters; give "
            "the image another name, or a link with one",
        )
    return text


def look(uri: str, *, read_only: bool) -> tuple[str, Look]:
    """Return (the storage behind a volume's URI, what was seen of it); raises `Fault`."""
    storage = storage_of(uri)
    try:
        return storage, examine(storage, read_only=read_only)
    except ConfigError as error:
        raise Fault(Code.BAD_URI, f"{uri}: {error}") from None
    except EngineError as error:
        text = f"{uri}: {describe(error)}"
        if not read_only and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            remedy = "make it writable, or attach the volume read-only (VDI_ACTIVATE_READONLY)"
            raise Fault(Code.READ_ONLY, f"{text}; {remedy}") from None
        raise Fault(Code.NO_STORAGE, text) from None


class Uses:
    """The uses of volumes, kept in a directory from attach to detach."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @contextlib.contextmanager
    def held(self) -> Iterator["Uses"]:
        """Keep other calls from what is read and written meanwhile."""
        directory = own_directory(self._directory)
        try:
            fcntl.flock(directory, fcntl.LOCK_EX)
            yield self
        finally:
            os.close(directory)

    def find(self, uri: str, domain: str) -> Use | None:
        """Return the use of a volume for a domain, if there is one."""
        return self._read(_name_of(uri, domain))

    def of_volume(self, uri: str) -> list[Use]:
        """Return every use of a volume."""
        names = sorted(self._directory.glob(f"{_digest(uri)}-*"))
        return [use for path in names if (use := self._read(path.name)) is not None]

    def keep(self, use: Use) -> None:
        """Write a use down, in the place of what was there."""
        name = _name_of(use.uri, use.domain)
        directory = own_directory(self._directory)
        try:
            remove(directory, f"new-{name}")
            with open(create_own(directory, f"new-{name}"), "w") as file:
                json.dump(asdict(use), file)
            os.rename(f"new-{name}", name, src_dir_fd=directory, dst_dir_fd=directory)
        finally:
            os.close(directory)

    def forget(self, uri: str, domain: str) -> None:
        """Remove a use, and the directory with the last one."""
        directory = own_directory(self._directory)
        try:
            remove(directory, _name_of(uri, domain))
        finally:
            os.close(directory)
        remove_empty(self._directory)

    def _read(self, name: str) -> Use | None:
        directory = own_directory(self._directory)
        try:
            fd = open_own(directory, name)
        finally:
            os.close(directory)
        if fd is None:
            return None
        with open(fd) as file:
            kept = json.load(file)
        return Use(**kept | {"activation": Activation(kept["activation"])})


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _name_of(uri: str, domain: str) -> str:
    return f"{_digest(uri)}-{_digest(domain)}"


class Plugin:
    """Answers the calls. directory: of what is kept between them. backend: who serves the disks."""

    def __init__(self, directory: Path, backend: Backend, version: str) -> None:
        self._uses = Uses(directory)
        self._backend = backend
        self._version = version
        self._calls: dict[str, Callable[..., Awaitable[object]]] = {
            "plugin.query": self.query,
            "datapath.open": self.open,
            "datapath.attach": self.attach,
            "datapath.activate": self.activate,
            "datapath.activate_readonly": self.activate_readonly,
            "datapath.deactivate": self.deactivate,
            "datapath.detach": self.detach,
            "datapath.close": self.close,
        }

    async def call(self, name: str, text: str) -> object:
        """Answer a call: its name as xapi or its script writes it, and its arguments as JSON.

        Raises `Fault`, and OSError where nothing can be kept.
        """
        method = self._calls.get(name.lower())
        if method is None:
            known = ", ".join(sorted(self._calls))
            raise Fault(Code.UNIMPLEMENTED, f"{name}: there is no such call; there are {known}")
        return await method(_arguments_of(text))

    async def query(self, _: "Arguments") -> object:
        """Tell what the plugin is and can do."""
        return {
            "plugin": SCHEME,
            "name": "xvd",
            "description": "Disks of guests are served by xvd backend, from any storage of xvd",
            "vendor": "xvd",
            "copyright": "Apache-2.0",
            "version": self._version,
            "required_api_version": "5.0",
            "features": ["VDI_ACTIVATE_READONLY"],
            "configuration": {},
            "required_cluster_stack": [],
        }

    async def open(self, arguments: "Arguments") -> None:
        """Say before an attach whether what is written is to stay; it does always."""
        uri = arguments.text("uri")
        storage_of(uri)
        if not arguments.switch("persistent"):
            raise Fault(
                Code.NOT_PERSISTENT,
                f"{uri}: what is written stays; let the volume plugin make a clone, as xapi does "
                "for a datapath without the feature NONPERSISTENT",
            )

    async def attach(self, arguments: "Arguments") -> object:
        """Tell how xenopsd leads a guest to the backend; the same again for an attach again."""
        uri, domain = arguments.text("uri"), arguments.text("domain")
        storage, seen = look(uri, read_only=True)
        with self._uses.held():
            use = self._uses.find(uri, domain)
        if use is None:
            kinds = await self._patiently(uri)
            use = Use(uri, domain, _TAP if _TAP in kinds else kinds[0])
            with self._uses.held():
                self._uses.keep(use)
        extra = {STORAGE.partition("/")[2]: storage}
        disk = {"backend_type": use.kind, "params": uri, "extra": extra}
        own = [["BlockDevice" if seen.is_device else "File", {"path": seen.path}]]
        return {"implementations": [["XenDisk", disk], *(own if seen.path else [])]}

    async def activate(self, arguments: "Arguments") -> None:
        """Check what is only now to be so: that the storage can be written to, by a backend."""
        await self._activate(arguments, Activation.WRITING)

    async def activate_readonly(self, arguments: "Arguments") -> None:
        """Check the same for a guest that only reads."""
        await self._activate(arguments, Activation.READING)

    async def _activate(self, arguments: "Arguments", wanted: Activation) -> None:
        uri, domain = arguments.text("uri"), arguments.text("domain")
        with self._uses.held():
            self._may_activate(uri, domain, wanted)
        look(uri, read_only=wanted is Activation.READING)
        await self._patiently(uri)
        with self._uses.held():
            self._uses.keep(replace(self._may_activate(uri, domain, wanted), activation=wanted))

    def _may_activate(self, uri: str, domain: str, wanted: Activation) -> Use:
        """Return the use that is to be activated; raises `Fault` where that may not be."""
        storage_of(uri)
        use = self._uses.find(uri, domain)
        if use is None:
            raise Fault(
                Code.NOT_ATTACHED,
                f"{uri} is not attached for domain {domain}: call Datapath.attach first",
            )
        for other in self._uses.of_volume(uri):
            if other.activation not in (Activation.NONE, wanted):
                raise Fault(
                    Code.IN_USE,
                    f"{uri} is activated {other.activation} for domain {other.domain}, and is not "
                    f"to be {wanted} at the same time: call Datapath.deactivate for that first",
                )
        return use

    async def deactivate(self, arguments: "Arguments") -> None:
        """Wait until the backend has written all of it and closed the storage."""
        uri, domain = arguments.text("uri"), arguments.text("domain")
        with self._uses.held():
            use = self._uses.find(uri, domain)
        if use is None or use.activation is Activation.NONE:
            return
        await self._until_let_go(uri, domain)
        with self._uses.held():
            self._uses.keep(replace(use, activation=Activation.NONE))

    async def detach(self, arguments: "Arguments") -> None:
        """Forget the use. Never fails for one that is not there."""
        uri, domain = arguments.text("uri"), arguments.text("domain")
        with self._uses.held():
            self._uses.forget(uri, domain)

    async def close(self, arguments: "Arguments") -> None:
        """Do nothing: what was written stays."""
        arguments.text("uri")

    async def _patiently(self, uri: str) -> list[str]:
        """Return the kinds that a backend serves, once one answers."""
        try:
            async with asyncio.timeout(BEGIN_S):
                while True:
                    with contextlib.suppress(PeerClosed):
                        return await self._backend.kinds()
                    await asyncio.sleep(_AGAIN_S)
        except TimeoutError:
            raise Fault(
                Code.NO_BACKEND,
                f"{uri}: no backend answers that could serve it; see systemctl status xvd-backend, "
                "and start it: systemctl start xvd-backend",
            ) from None

    async def _until_let_go(self, uri: str, domain: str) -> None:
        """Wait until no disk of a guest is on a volume's storage any more."""
        _, image = parse_xl_params(storage_of(uri))
        if not (domain.isascii() and domain.isdigit()):
            return  # dom0's own use, which is by the path
        try:
            async with asyncio.timeout(LET_GO_S):
                while image in await self._backend.images(int(domain)):  # noqa: ASYNC110
                    await asyncio.sleep(_AGAIN_S)
        except (TimeoutError, PeerClosed) as error:
            why = describe(error) if isinstance(error, PeerClosed) else "it has the storage open"
            raise Fault(
                Code.IN_USE,
                f"{uri}: the backend has not let go of it for domain {domain} ({why}); detach the "
                "guest's disk, or see xvd stats",
            ) from None


@dataclass(frozen=True, slots=True)
class Arguments:
    """The arguments of a call by name."""

    given: Mapping[str, Any]

    def text(self, name: str) -> str:
        """Return an argument that is text; raises `Fault`."""
        return str(self._get(name, str, "text"))

    def switch(self, name: str) -> bool:
        """Return an argument that is true or false; raises `Fault`."""
        return bool(self._get(name, bool, "true or false"))

    def _get(self, name: str, kind: type, means: str) -> Any:
        value = self.given.get(name)
        if not isinstance(value, kind) or value == "":
            said = "is missing" if name not in self.given else f"is {value!r}"
            raise Fault(Code.BAD_CALL, f"the argument {name} {said}; it has to be {means}")
        return value


def _arguments_of(text: str) -> Arguments:
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Fault(Code.BAD_CALL, f"standard input is no JSON: {error}; give an object") from None
    if not isinstance(given, dict):
        raise Fault(Code.BAD_CALL, f"standard input is {given!r}; give a JSON object of arguments")
    return Arguments(given)
