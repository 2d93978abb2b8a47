# SPDX-License-Identifier: Apache-2.0
"""What the verbs share: their options, which host and disk they mean, and logging."""

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from xvd.blkif.vdev import parse_disk
from xvd.cli import completion
from xvd.errors import ConfigError, describe
from xvd.machine.xen.here import XEN_DIRECTORY, available

if TYPE_CHECKING:
    from rich.console import Console


# readable=False: what is in the directory has to be; the exporter may not list /run/xvd itself.
HostDir = Annotated[
    Path,
    typer.Option(
        "--host",
        envvar="XVD_HOST",
        readable=False,
        help="Directory of the emulated host (xvd host DIR).",
    ),
]
HostOrXen = Annotated[
    Path | None,
    typer.Option(
        "--host",
        envvar="XVD_HOST",
        readable=False,
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
Guest = Annotated[
    int,
    typer.Argument(min=0, help="The guest's domain number.", autocompletion=completion.guests),
]
Vdev = Annotated[
    str,
    typer.Argument(help="The disk's name or number: xvda, 51712.", autocompletion=completion.vdevs),
]

DEFAULT_HOST = (
    XEN_DIRECTORY if available() else Path(os.environ.get("XDG_RUNTIME_DIR", "/run")) / "xvd"
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
    try:
        return parse_disk(text)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def absolute(storage: str) -> str:
    """Storage whose path, if relative, begins where we are: a daemon runs somewhere else."""
    from xvd.toolstack.xldisk import absolute_target  # which knows every engine

    return absolute_target(storage, Path.cwd())


def complain(text: str) -> None:
    """Print one line on stderr, as a daemon or a verb that fails does."""
    sys.stderr.write(f"xvd: {text}\n")


def start_logging(verbose: int) -> None:
    """Log to stderr: warnings, with -v what happens, with -vv everything.

    Where stderr is the journal, each line goes there with its fields.
    """
    handler: logging.Handler | None = None
    if "JOURNAL_STREAM" in os.environ:
        from xvd.service.journal import handler_of

        handler = handler_of(sys.stderr)
    if handler is None:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("xvd: %(levelname)s: %(message)s"))
    logging.basicConfig(handlers=[handler], force=True)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    log_at(verbose)


def log_at(verbose: int) -> None:
    """Log as much as so many -v say, from now on."""
    logging.getLogger().setLevel((logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)])


def stderr() -> "Console":
    """Return the console of progress bars: not with the data, and not off a terminal."""
    from rich.console import Console

    return Console(stderr=True, quiet=not sys.stderr.isatty())


PORT_MAX: Final = 65535

NBD_DANGER: Final = "NBD is unauthenticated and unencrypted: whoever reaches the port owns the disk"


def parse_tcp(text: str, *, allow_remote: bool, danger: str = NBD_DANGER) -> tuple[str, int] | None:
    """The address in ``HOST:PORT`` or ``PORT`` (then on loopback); None for nothing.

    Raises `ConfigError` for one that others than this machine reach, unless that is allowed.
    danger: what whoever reaches it can do, in words; empty where there is none.
    """
    if not text:
        return None
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdigit()):
        raise ConfigError(f"{text!r} is no address; write HOST:PORT, or PORT for loopback")
    if int(port) > PORT_MAX:
        raise ConfigError(f"{text!r}: there is no port {port}; ports go from 0 to {PORT_MAX}")
    host = host.strip("[]") or "127.0.0.1"
    if danger and not _is_loopback(host):
        if not allow_remote:
            raise ConfigError(f"{text}: {danger}; export on loopback, or say --allow-remote")
        sys.stderr.write(f"xvd: warning: {text}: {danger}\n")
    return host, int(port)


def _is_loopback(host: str) -> bool:
    """Whether all that a name means stays on this machine."""
    import ipaddress
    import socket

    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{host!r} is no host: {describe(error)}") from None
    return all(ipaddress.ip_address(str(it[4][0]).partition("%")[0]).is_loopback for it in found)
