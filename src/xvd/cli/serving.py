# SPDX-License-Identifier: Apache-2.0
"""How ``xvd serve`` and ``xvd nbd`` export disks: where, under which names, by which credentials,
and for how long, in the words of nbdkit and qemu-nbd."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from ssl import SSLContext
from typing import Annotated

import typer

from xvd.blkif.vdev import format_vdev, vdev_number
from xvd.cli import common, output, running
from xvd.errors import ConfigError
from xvd.export.nbd import NbdServer
from xvd.export.tls import CA, CERTIFICATE, KEY, server_context

PRIVATE = Path("-")
"""Asks for a socket where nobody else finds it, as with nbdkit's ``-U -``."""
ANYBODY = "TLS without --tls-verify-peer lets anybody in: whoever reaches the port owns the disk"
DISKS_MAX = 16
"""Disks with short names: xvda to xvdp."""

Format = Annotated[
    str,
    typer.Option(
        "-f",
        "--format",
        help="What the image is: qcow2, vhdx and so on; raw: serve the bytes as they lie, also if "
        "they look like another format.",
    ),
]
ExportName = Annotated[str, typer.Option("-e", "--export-name", help="The export's name.")]
ExportNames = Annotated[
    list[str],
    typer.Option(
        "-e",
        "--export-name",
        help="The export's name; with several images one for each, in their order (default: their "
        "files' names).",
    ),
]
Run = Annotated[
    str,
    typer.Option(
        "--run",
        help="Shell command to run with $uri set, and $unixsocket, $nbd, $port, $exportname and "
        "$tls; its status is ours.",
    ),
]
Socket = Annotated[
    Path | None,
    typer.Option(
        "--socket", "-U", "--unix", help="Path of the NBD socket; - and the default: a private one."
    ),
]
TlsCreds = Annotated[
    Path | None,
    typer.Option(
        "--tls-creds",
        metavar="DIR",
        help=f"Demand TLS on TCP, by {CERTIFICATE} and {KEY} in this directory.",
    ),
]
VerifyPeer = Annotated[
    bool,
    typer.Option(
        "--tls-verify-peer",
        help=f"Demand of clients a certificate that {CA} of --tls-creds has signed. --tcp may then "
        "be reached from elsewhere.",
    ),
]
PidFile = Annotated[
    Path | None,
    typer.Option(
        "--pidfile", "-P", "--pid-file", help="Write our process's number here once we serve."
    ),
]
ExitWithParent = Annotated[
    bool, typer.Option("--exit-with-parent", help="End, as by SIGTERM, when our parent has ended.")
]


@dataclass(frozen=True, slots=True)
class Places:
    """Where clients find the disks, and what tells them."""

    socket: Path
    tcp: tuple[str, int] | None
    tls: SSLContext | None
    pidfile: Path | None
    command: str

    async def listen(self, server: NbdServer) -> None:
        """Accept clients in all of them; raises as `NbdServer.listen_unix` and `listen_tcp`."""
        await server.listen_unix(self.socket)
        if self.tcp is not None:
            await server.listen_tcp(*self.tcp, tls=self.tls)

    def variables(self, server: NbdServer) -> dict[str, str]:
        """The environment of ``--run``, with nbdkit's names: on TCP if that was asked for.

        Of several disks it is the first one's.
        """
        name, places = server.name, len(server.ports)
        uri = server.uris[(places - 1) * (len(server.uris) // places)]
        port = next((it for it in server.ports if it), None)
        old = f"nbd:unix:{self.socket}"
        if port is not None and self.tcp is not None:
            old = f"nbd:{self.tcp[0]}:{port}"
        return {
            "uri": uri, "unixsocket": str(self.socket), "port": str(port or ""),
            "nbd": f"{old}:exportname={name}" if name else old, "exportname": name,
            "tls": "require" if self.tls else "",
        }  # fmt: skip

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Have the process's number in its file; raises OSError where it cannot be written."""
        if self.pidfile is None:
            yield
            return
        self.pidfile.write_text(f"{os.getpid()}\n")
        try:
            yield
        finally:
            self.pidfile.unlink(missing_ok=True)

    async def use(self, server: NbdServer, stop: running.Stop) -> int | None:
        """Run the command, whose status is returned; or print the URIs and return None."""
        if self.command:
            return await running.run_captive(self.command, stop, **self.variables(server))
        output.tell("".join(f"{uri}\n" for uri in server.uris))
        return None


def places(
    directory: Path,
    *,
    socket: Path | None,
    tcp: str,
    allow_remote: bool,
    tls_creds: Path | None,
    verify_peer: bool,
    pidfile: Path | None,
    command: str,
) -> Places:
    """Gather where the disks are exported, by the options.

    directory: for a private socket. Raises `ConfigError` for options that contradict each other.
    """
    if tls_creds is not None and not tcp:
        raise ConfigError("--tls-creds is for TCP; say where: --tcp PORT")
    if verify_peer and tls_creds is None:
        raise ConfigError("--tls-verify-peer needs --tls-creds DIR")
    tls = None if tls_creds is None else server_context(tls_creds, verify_peer=verify_peer)
    danger = common.NBD_DANGER if tls is None else "" if verify_peer else ANYBODY
    address = common.parse_tcp(tcp, allow_remote=allow_remote, danger=danger)
    where = directory / "nbd.sock" if socket in (None, PRIVATE) else socket
    assert where is not None
    return Places(where, address, tls, pidfile, command)


def name_exports(images: Sequence[str], names: Sequence[str]) -> list[str]:
    """One name for each image: those that were given, or by their files; that of one is empty.

    `ConfigError` for another number of names than of images, and for two that are the same.
    """
    if names and len(names) != len(images):
        raise ConfigError(
            f"{len(images)} images and {len(names)} names; give one --export-name for each"
        )
    found = list(names) or ([""] if len(images) == 1 else [_file_of(image) for image in images])
    if twice := next((name for name in found if found.count(name) > 1), None):
        raise ConfigError(f"two exports would be called {twice!r}; name them: --export-name")
    return found


def _file_of(image: str) -> str:
    """``a.img`` of ``/images/a.img``, ``qcow2:/images/a.img`` or ``cow|a.img``."""
    return PurePath(image.rpartition("|")[2]).name.rpartition(":")[2]


def vdevs(count: int, first: str) -> list[str]:
    """The guest's names of so many disks; `ConfigError` for too many, or where `first`, a name that
    was given, is not the only one."""
    if first:
        if count > 1:
            raise ConfigError("--vdev names one disk; several are xvda, xvdb and so on")
        return [first]
    if count > DISKS_MAX:
        raise ConfigError(f"{count} images; {DISKS_MAX} are the most that one guest is given here")
    base = vdev_number("xvda")
    return [format_vdev(base + (number << 4)) for number in range(count)]
