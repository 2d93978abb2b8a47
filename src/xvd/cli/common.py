# SPDX-License-Identifier: Apache-2.0
"""What the verbs share: their options, which host and disk they mean, and logging."""

import contextlib
import ipaddress
import logging
import os
import resource
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console

from xvd import joining
from xvd.backend.budget import Budget
from xvd.backend.limits import XEN_MAPTRACK, descriptor_limits, limits_of_host
from xvd.cli import completion
from xvd.engines.uri import LAYERS, SCHEMES
from xvd.errors import ConfigError, describe
from xvd.machine.emulated.limits import Limits
from xvd.machine.interface import Machine
from xvd.machine.xen import machine as xen
from xvd.types import Domid


def _storage() -> dict[str, list[str]]:
    """How storage is written, by what is then served."""
    found: dict[str, list[str]] = {}
    for scheme in SCHEMES.values():
        found.setdefault(scheme.help, []).append(scheme.form)
    return found


HostDir = Annotated[
    Path,
    typer.Option(
        "--host",
        envvar="XVD_HOST",
        help="Directory of the emulated host (xvd host DIR).",
    ),
]
HostOrXen = Annotated[
    Path | None,
    typer.Option(
        "--host",
        envvar="XVD_HOST",
        help="Directory of an emulated host (xvd host DIR). Without it: this domain, where Xen is.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Verbose = Annotated[int, typer.Option("-v", "--verbose", count=True, help="Log more; twice: all.")]
Tcp = Annotated[
    str,
    typer.Option("--tcp", help="Export on TCP as well: [HOST:]PORT; port 0 is any free one."),
]
Remote = Annotated[
    bool,
    typer.Option("--allow-remote", help="Let --tcp be reached from elsewhere, unauthenticated."),
]
Layers = Annotated[
    list[str],
    typer.Option(
        "--layer",
        autocompletion=completion.layers,
        help="A layer in front of the storage: "
        + "; ".join(f"{layer.example} ({layer.help})" for layer in LAYERS.values())
        + ". May be given several times; the first is nearest to the guest.",
    ),
]
Images = Annotated[
    list[str],
    typer.Argument(
        metavar="IMAGE...",
        help="Image file, block device, or engine URI: "
        + "; ".join(f"{', '.join(forms)} ({what})" for what, forms in _storage().items())
        + ".",
    ),
]
vdev_number = joining.vdev_number

Guest = Annotated[
    int,
    typer.Argument(min=0, help="The guest's domain number.", autocompletion=completion.guests),
]
Vdev = Annotated[
    str,
    typer.Argument(help="The disk's name or number: xvda, 51712.", autocompletion=completion.vdevs),
]

DEFAULT_HOST = (
    joining.XEN_DIRECTORY
    if xen.available()
    else Path(os.environ.get("XDG_RUNTIME_DIR", "/run")) / "xvd"
)


def split_settings(settings: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Settings for every disk, and for those that are named: ``1/xvda:max_queues=1``."""
    for_all: list[str] = []
    for_one: dict[str, list[str]] = {}
    for text in settings:
        disk, colon, setting = text.rpartition(":")
        if not colon:
            for_all.append(text)
            continue
        for_one.setdefault(disk_key(disk), []).append(setting)
    return for_all, for_one


def split_groups(limits: Sequence[str]) -> dict[str, list[str]]:
    """Limits of named groups: ``gold:total_iops_sec=5000``; `ConfigError` for anything else."""
    groups: dict[str, list[str]] = {}
    for text in limits:
        group, colon, limit = text.partition(":")
        if not colon:
            raise ConfigError(f"{text!r} limits nothing; write GROUP:NAME=VALUE")
        groups.setdefault(group, []).append(limit)
    return groups


def disk_key(text: str) -> str:
    """``1/51712`` from ``1/xvda``; `ConfigError` for anything else."""
    domid, slash, vdev = text.partition("/")
    if not slash or not domid.isdigit():
        raise ConfigError(f"{text!r} names no disk; write DOMID/VDEV, as 1/xvda")
    return f"{int(domid)}/{vdev_number(vdev)}"


async def open_machine(host: Path | None, domid: Domid | None) -> tuple[Machine, Path]:
    """Connect to a domain, as `joining.open_machine`; without a host and without Xen, to one of the
    emulated host in the usual place."""
    if host is None and not xen.available():
        host = DEFAULT_HOST
    return await joining.open_machine(host, domid)


def budget_of(machine: Machine) -> Budget:
    """Return what this host has for the disks of a daemon on such a machine."""
    if not isinstance(machine, xen.XenMachine):
        return emulated_budget()
    return _budget(XEN_MAPTRACK)


def emulated_budget() -> Budget:
    """Return the budget of an emulated machine, as `budget_of`."""
    return _budget(Limits().tracks)


def _budget(tracks: int) -> Budget:
    _, most = descriptor_limits()
    with contextlib.suppress(OSError, ValueError):
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return Budget(limits_of_host(tracks))


def start_logging(verbose: int) -> None:
    """Log to stderr: warnings, with -v what happens, with -vv everything."""
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    logging.basicConfig(
        stream=sys.stderr, level=level, format="xvd: %(levelname)s: %(message)s", force=True
    )
    logging.getLogger("asyncio").setLevel(logging.WARNING)


def stderr() -> Console:
    """Return the console of progress bars: not with the data, and not off a terminal."""
    return Console(stderr=True, quiet=not sys.stderr.isatty())


NBD_DANGER: Final = "NBD is unauthenticated and unencrypted: whoever reaches the port owns the disk"


def parse_tcp(text: str, *, allow_remote: bool, danger: str = NBD_DANGER) -> tuple[str, int] | None:
    """The address in ``HOST:PORT`` or ``PORT`` (then on loopback); None for nothing.

    Raises `ConfigError` for one that others than this machine reach, unless that is allowed.
    danger: what whoever reaches it can do, in words; empty where there is none.
    """
    if not text:
        return None
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdigit() and int(port) <= 65535):
        raise ConfigError(f"{text!r} is no address; write HOST:PORT, or PORT for loopback")
    host = host.strip("[]") or "127.0.0.1"
    if danger and not _is_loopback(host):
        if not allow_remote:
            raise ConfigError(f"{text}: {danger}; export on loopback, or say --allow-remote")
        sys.stderr.write(f"xvd: warning: {text}: {danger}\n")
    return host, int(port)


def _is_loopback(host: str) -> bool:
    """Whether all that a name means stays on this machine."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{host!r} is no host: {describe(error)}") from None
    return all(ipaddress.ip_address(str(it[4][0]).partition("%")[0]).is_loopback for it in found)
