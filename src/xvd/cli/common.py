# SPDX-License-Identifier: Apache-2.0
"""What the verbs share: where the host is, logging, signals, the captive command, JSON."""

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
import sys
import tempfile
from collections.abc import Awaitable, Coroutine, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console

from xvd.backend.blocking import in_own_thread
from xvd.backend.budget import XEN_MAPTRACK, Budget, descriptor_limits, limits_of_host
from xvd.blkif.nodes import BackendAssignment
from xvd.blkif.vdev import parse_vdev
from xvd.cli.control import ask
from xvd.engines.interface import Engine
from xvd.engines.uri import open_engine
from xvd.errors import ConfigError, PeerClosed, XenstoreError
from xvd.machine.emulated.host import Limits
from xvd.machine.emulated.service import connect
from xvd.machine.interface import Machine
from xvd.machine.xen import machine as xen
from xvd.machine.xs.client import XenstoreClient
from xvd.toolstack.xldisk import in_format
from xvd.types import Domid

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
Layers = Annotated[
    list[str],
    typer.Option(
        "--layer",
        help="A layer in front of the storage: delay:read=1ms, error:one_in=10,seed=1, readonly, "
        "stats, log. May be given several times; the first is nearest to the guest.",
    ),
]
XEN_DIRECTORY = Path("/run/xvd")
"""Where the daemons of a real Xen domain have their control sockets and journals."""

Guest = Annotated[int, typer.Argument(min=1, help="The guest's domain number.")]
Vdev = Annotated[str, typer.Argument(help="The disk's name or number: xvda, 51712.")]

DEFAULT_HOST = (
    XEN_DIRECTORY if xen.available() else Path(os.environ.get("XDG_RUNTIME_DIR", "/run")) / "xvd"
)


def vdev_number(text: str) -> int:
    """The number of a disk's name; `ConfigError` for what is neither."""
    try:
        return parse_vdev(text)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def split_settings(settings: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Settings for every disk, and for those that are named: ``1/xvda:max_queues=1``."""
    for_all: list[str] = []
    for_one: dict[str, list[str]] = {}
    for text in settings:
        disk, colon, setting = text.rpartition(":")
        if not colon:
            for_all.append(text)
            continue
        for_one.setdefault(disk_name(disk), []).append(setting)
    return for_all, for_one


def disk_name(text: str) -> str:
    """``1/51712`` from ``1/xvda``; `ConfigError` for anything else."""
    domid, slash, vdev = text.partition("/")
    if not slash or not domid.isdigit():
        raise ConfigError(f"{text!r} names no disk; write DOMID/VDEV, as 1/xvda")
    return f"{int(domid)}/{vdev_number(vdev)}"


async def daemon_of(host: Path, disk: str) -> Path:
    """The control socket of the daemon that serves the disk ``DOMID/VDEV``; `PeerClosed`."""
    for path in sorted((host / "control").glob("backend-*")):
        with contextlib.suppress(PeerClosed):
            if any(d["disk"].endswith(f"/{disk}") for d in await ask(path, "stats")):
                return path
    raise PeerClosed(f"{host}: no daemon serves the disk {disk}; see xvd list, xvd stats")


async def open_machine(host: Path | None, domid: Domid | None) -> tuple[Machine, Path]:
    """A stake in a domain, and the directory for what its daemons keep.

    host: an emulated host's directory, where no domid means domain 0. Without one, the Xen domain
    that we run in, if there is Xen, and otherwise the emulated host in the usual place. Raises
    `ConfigError` for a domid that is not the one we run in.
    """
    if host is not None or not xen.available():
        host = host or DEFAULT_HOST
        return connect(host, domid or Domid(0)), host
    here = await xen.XenMachine.here()
    if domid is not None and domid != here.domid:
        raise ConfigError(f"this is domain {here.domid}: run it in domain {domid}")
    return here, XEN_DIRECTORY


def budget_of(machine: Machine) -> Budget:
    """What this host has for the disks of a daemon on such a machine."""
    real = isinstance(machine, xen.XenMachine)
    _, most = descriptor_limits()
    with contextlib.suppress(OSError, ValueError):
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return Budget(limits_of_host(XEN_MAPTRACK if real else Limits().tracks))


def tell_service_manager(state: str) -> None:
    """Say `state` ("READY=1") to systemd, if it started us with Type=notify (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out:
            out.sendto(state.encode(), address.replace("@", "\0", 1))


def start_logging(verbose: int) -> None:
    """Log to stderr: warnings, with -v what happens, with -vv everything."""
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    logging.basicConfig(
        stream=sys.stderr, level=level, format="xvd: %(levelname)s: %(message)s", force=True
    )
    logging.getLogger("asyncio").setLevel(logging.WARNING)


def run(main: Coroutine[Any, Any, int]) -> int:
    """Run a verb's coroutine; its result is the exit status."""
    return asyncio.run(main)


def print_json(value: object) -> None:
    """One JSON document on stdout."""
    text = msgspec.json.format(msgspec.json.encode(value), indent=2)
    sys.stdout.write(text.decode() + "\n")


def stderr() -> Console:
    """Where progress bars go: not with the data, and not off a terminal."""
    return Console(stderr=True, quiet=not sys.stderr.isatty())


class Stop:
    """SIGTERM and SIGINT ask for a clean end; a second one ends at once."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._ask)

    def _ask(self) -> None:
        if self.asked.is_set():
            os._exit(1)
        self.asked.set()

    async def wait(self) -> None:
        """Until the first signal."""
        await self.asked.wait()

    async def wait_or(self, other: Awaitable[object]) -> bool:
        """Until the first signal or the end of `other`; whether it was the signal."""
        waits = asyncio.ensure_future(other), asyncio.ensure_future(self.wait())
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        return self.asked.is_set()


async def run_captive(command: str, stop: Stop, **variables: str) -> int:
    """Run a shell command with `variables` set; its exit status, 128+n if a signal ended it.

    A signal to us is passed on to it.
    """
    process = await asyncio.create_subprocess_shell(
        command, env={**os.environ, **variables}, start_new_session=True
    )
    if await stop.wait_or(process.wait()) and process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
    status = await process.wait()
    return status if status >= 0 else 128 - status


@contextlib.contextmanager
def private_directory() -> Iterator[Path]:
    """A directory for sockets that only this user may enter, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="xvd-") as path:
        yield Path(path)


def storage_uri(assignment: BackendAssignment) -> str:
    """The engine URI of a disk that the toolstack assigned.

    In the tap slot libxl puts ``aio:`` before the target, whatever it is; a path is one of a file.
    """
    if assignment.image_format != "raw":
        return f"{assignment.image_format}:{assignment.image}"
    if assignment.format_said:
        return in_format(assignment.image, "raw")
    return assignment.image


LOCK_PATIENCE_S = 5.0
"""How long a backend waits for the lock of a predecessor that was killed with I/O in flight."""


async def has_device_model(store: XenstoreClient, domid: Domid) -> bool:
    """Whether a QEMU has a guest's disks open as well, until the guest's own drivers come.

    libxl tells the domain's type. QEMU's own backend takes no lock for that reason.
    """
    with contextlib.suppress(XenstoreError):
        return await store.try_read(f"/libxl/{domid}/type") == "hvm"
    return False


async def open_assigned(
    store: XenstoreClient, assignment: BackendAssignment, layers: list[str]
) -> Engine:
    """Open the storage of an assigned disk without holding up the event loop."""
    name = assignment.name or assignment.frontend.rpartition("/")[2]
    opening = partial(
        open_engine,
        storage_uri(assignment),
        read_only=not assignment.writable,
        layers=layers,
        patience_s=LOCK_PATIENCE_S,
        user=f"{assignment.frontend_domid}/{name}",
        device_model=await has_device_model(store, assignment.frontend_domid),
    )
    return await in_own_thread(opening)


def parse_tcp(text: str) -> tuple[str, int]:
    """``HOST:PORT`` or ``PORT`` (then on loopback)."""
    host, _, port = text.rpartition(":")
    if not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"{text!r} is no address; write HOST:PORT, or PORT for loopback")
    return host.strip("[]") or "127.0.0.1", int(port)
