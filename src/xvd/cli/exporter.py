# SPDX-License-Identifier: Apache-2.0
"""``xvd exporter``: the figures of every disk as Prometheus metrics."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from socket import socket
from typing import Annotated, Final

import typer
from prometheus_client import CollectorRegistry

from xvd import __version__
from xvd.cli import common, output, running
from xvd.cli.control import FIGURES
from xvd.cli.daemons import ALIVE, ask_one
from xvd.cli.guests import guest_names
from xvd.errors import ConfigError, XvdError
from xvd.service.exporter import (
    TEXTFILE_SUFFIX,
    listen_tcp,
    registry_of,
    serving,
    write_textfile,
)
from xvd.service.metrics import Daemon, Scrape, disks_of
from xvd.sockets import claim

DEFAULT_ADDRESS: Final = "127.0.0.1:9779"
UNIX: Final = "unix:"
DANGER: Final = "whoever reaches the port reads the figures of every guest"


def exporter(
    host: common.HostDir = common.DEFAULT_HOST,
    listen: Annotated[
        str,
        typer.Option(
            "--listen", metavar="ADDRESS",
            help="Where scrapes come: [HOST:]PORT, port 0 for any free one, or unix:PATH.",
        ),
    ] = DEFAULT_ADDRESS,
    allow_remote: Annotated[
        bool,
        typer.Option("--allow-remote", help="Let --listen be reached from elsewhere."),
    ] = False,
    textfile: Annotated[
        Path | None,
        typer.Option(
            "--textfile", metavar="FILE.prom",
            help="Listen nowhere: write the file for node_exporter's textfile collector, and end.",
        ),
    ] = None,
    interval: Annotated[
        float,
        typer.Option(
            "--interval", min=0, help="With --textfile: write it again after so many seconds."
        ),
    ] = 0.0,
    verbose: common.Verbose = 0,
) -> int:  # fmt: skip
    """Offer the figures of every disk of a host to Prometheus.

    Each scrape asks every daemon of the host, and takes four seconds at most. A daemon that is
    dead or hangs is shown by xvd_up 0. Prints the address when it listens, and runs until SIGINT or
    SIGTERM. docs/metrics.md has the list of metrics.
    """  # fmt: skip
    common.start_logging(verbose)
    registry = registry_of(lambda: asyncio.run(_scrape(host)))
    if textfile is not None:
        if textfile.suffix != TEXTFILE_SUFFIX:
            raise ConfigError(f"{textfile}: node_exporter reads no such file; name it NAME.prom")
        _check_host(host)
        return running.run(_write(registry, textfile, interval))
    if interval:
        raise ConfigError("--interval is for --textfile; Prometheus has its own scrape_interval")
    with _listening(listen, allow_remote) as (listener, address), serving(registry, listener):
        return running.run(_until_stopped(address))


def _check_host(host: Path) -> None:
    """Raise `ConfigError` for a directory where no daemon has ever been.

    A file without any disk would look like a host without any.
    """
    if not host.is_dir():
        raise ConfigError(f"{host}: there is no such directory; name the host's: --host DIR")
    if not (host / FIGURES).is_dir():
        raise ConfigError(
            f"{host}: no daemon has ever been there, as {host / FIGURES} is missing; name the "
            "host's directory (--host DIR), or start a backend first"
        )


async def _until_stopped(address: str) -> int:
    stop = running.Stop(running.GRACE_S)
    async with running.watched():
        output.tell(f"{address}\n")
        running.tell_service_manager("READY=1")
        await stop.wait()
    return 0


async def _write(registry: CollectorRegistry, path: Path, interval: float) -> int:
    stop = running.Stop(running.GRACE_S)
    while True:
        await asyncio.to_thread(write_textfile, registry, path)
        if not interval or await stop.wait_or(asyncio.sleep(interval)):
            return 0


@contextlib.contextmanager
def _listening(listen: str, allow_remote: bool) -> Iterator[tuple[socket, str]]:
    """(a socket that listens, how to reach it); what was made for it is removed at the end."""
    if listen.startswith(UNIX):
        claimed = claim(listen.removeprefix(UNIX))
        try:
            yield claimed.socket, f"{UNIX}{claimed.path}"
        finally:
            claimed.remove()
        return
    address = common.parse_tcp(listen, allow_remote=allow_remote, danger=DANGER)
    if address is None:
        raise ConfigError("--listen needs an address: HOST:PORT, PORT or unix:PATH")
    listener = listen_tcp(*address)
    name = f"[{address[0]}]" if ":" in address[0] else address[0]
    yield listener, f"http://{name}:{listener.getsockname()[1]}/metrics"


# ---- A scrape ----------------------------------------------------------------------------------


async def _scrape(host: Path) -> Scrape:
    """Ask every daemon of a host, all at once, and the store what their guests are called."""
    errors: Counter[str] = Counter()
    daemons = await asyncio.gather(*map(partial(_ask, errors), _sockets(host, errors)))
    disks = disks_of(daemons)[0]
    names = {disk.domain: str(disk.figures.get("guest_name", "")) for disk in disks}
    try:
        names |= await guest_names(host, [domid for domid, name in names.items() if not name])
    except (XvdError, OSError, TimeoutError):
        errors["names"] += 1
    return Scrape(daemons, names, errors, __version__)


def _sockets(host: Path, errors: Counter[str]) -> list[Path]:
    """Return the daemons' sockets for readers: one that is just being made is no socket yet."""
    try:
        return sorted(path for path in (host / FIGURES).iterdir() if path.is_socket())
    except FileNotFoundError:
        return []
    except OSError:
        errors["ask"] += 1
        return []


async def _ask(errors: Counter[str], path: Path) -> Daemon:
    began = time.monotonic()
    try:
        stats, about = await asyncio.gather(ask_one(path, "stats"), _about(path))
    except XvdError:
        errors["ask"] += 1
        return Daemon(path.name, False, time.monotonic() - began)
    told = stats.result if isinstance(stats.result, list) else []
    return Daemon(path.name, stats.state == ALIVE, time.monotonic() - began, about, told)


async def _about(path: Path) -> dict[str, object]:
    """Return what a daemon says of itself: nothing, if its version says nothing."""
    try:
        answer = await ask_one(path, "about")
    except XvdError:
        return {}
    return answer.result if isinstance(answer.result, dict) else {}
