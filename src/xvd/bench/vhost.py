# SPDX-License-Identifier: Apache-2.0
"""The ring beside another ring: qemu-storage-daemon's vhost-user-blk export, by libblkio.

Both serve the same image to a client in another thread or process over memory that the two share,
without NBD. libblkio is not in every Debian; where its headers are missing, the two packages are
taken from one that has it, and used from where they were unpacked.
"""

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from xvd.bench.peers import NotInstalled, missing, source_of
from xvd.bench.report import Cell, Plot, Report, Table
from xvd.bench.ring import Setup, case
from xvd.bench.run import Run, iops, mib
from xvd.bench.sample import Case, Rounds, Sample, ratio
from xvd.errors import ConfigError, XvdError
from xvd.frontend.load import Job

IMAGE_SIZE = 256 << 20
SUITE: Final = "trixie"
"""The Debian whose libblkio runs on older ones: it asks for glibc 2.34."""

PACKAGES: Final = ("libblkio1", "libblkio-dev")
CLIENTS: Final = {"sleeping": (), "polling": ("-p",)}
PATIENCE_S: Final = 60
"""How long a client may take, and a server to be there."""


class NotToBeHad(NotInstalled):
    """libblkio is neither installed nor to be fetched."""

    def __init__(self, why: str) -> None:
        ConfigError.__init__(self, f"libblkio is not to be had: {why}")


def _run(command: Sequence[str], cwd: Path | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise NotToBeHad(f"{command[0]}: {''.join(said)}")
    return done.stdout.strip()


# ---- The client ------------------------------------------------------------------------------


def build_client(directory: Path) -> Path:
    """Compile the client into a directory, with libblkio from here or from `SUITE`.

    Raises `NotInstalled`, and `NotToBeHad` with the reason; `NotShipped` without the source.
    """
    source = source_of("blkio.c")
    if lacking := missing("cc"):
        raise NotInstalled(*lacking)
    found = subprocess.run(
        ["pkg-config", "--cflags", "--libs", "blkio"], capture_output=True, text=True, check=False
    )
    flags = found.stdout.split() if found.returncode == 0 else _fetch(directory / "libblkio")
    client = directory / "blkio"
    _run(["cc", "-O2", "-o", str(client), str(source), *flags])
    return client


def _fetch(directory: Path) -> list[str]:
    """Unpack the packages below a directory, installing nothing; the compiler's flags for them."""
    if lacking := missing("apt-get", "dpkg-deb"):
        raise NotInstalled("libblkio-dev", *lacking)
    places = {name: directory / name for name in ("lists", "pool")}
    for place in places.values():
        (place / "partial").mkdir(parents=True)
    targets = _run(["apt-get", "indextargets", "--format", "$(REPO_URI)"]).splitlines()
    mirror = next((uri for uri in targets if uri.rstrip("/").endswith("/debian")), None)
    if mirror is None:
        raise NotToBeHad("apt has no Debian mirror configured")
    keys = "/usr/share/keyrings/debian-archive-keyring.gpg"
    sources, status = directory / "sources.list", directory / "status"
    sources.write_text(f"deb [signed-by={keys}] {mirror} {SUITE} main\n")
    status.touch()
    options = {
        "Dir::Etc::sourcelist": sources, "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State::lists": places["lists"], "Dir::State::status": status, "Dir::Cache": directory,
        "Dir::Cache::archives": places["pool"], "APT::Sandbox::User": "root",
        "Debug::NoLocking": "1", "APT::Update::Post-Invoke-Success": "",
    }  # fmt: skip
    apt = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in options.items())]
    _run([*apt, "update"])
    _run([*apt, "download", *PACKAGES], places["pool"])
    for package in places["pool"].glob("*.deb"):
        _run(["dpkg-deb", "-x", str(package), str(directory)])
    libraries = list(directory.glob("usr/lib/*/libblkio.so.1"))
    if not libraries:
        raise NotToBeHad(f"{SUITE} has no libblkio for this machine")
    return [f"-I{directory}/usr/include", str(libraries[0]), f"-Wl,-rpath,{libraries[0].parent}"]


# ---- The server ------------------------------------------------------------------------------


def vhost(name: str, client: Path, image: Path, job: Job, *flags: str, qcow2: bool = False) -> Case:
    """A job on an image that qemu-storage-daemon exports, past the page cache where it can. A qcow2
    one it serves as it does for our own engine: without an iothread."""
    numbers = {
        "-n": job.operations, "-d": job.depth, "-b": job.size, "-w": job.write_percent,
        "-s": job.span, "-r": job.seed,
    }  # fmt: skip
    words = [*flags, *(["-q"] if job.sequential else [])]
    words += [str(part) for pair in numbers.items() for part in pair]

    def measure() -> Sample:
        with tempfile.TemporaryDirectory(prefix="xvd-bench-") as directory:
            socket = Path(directory) / "socket"
            words_of = _qcow2_server if qcow2 else _server
            server = subprocess.Popen(words_of(image, socket), stderr=subprocess.PIPE, text=True)
            try:
                _await(socket, server)
                done = subprocess.run(
                    [client, socket, *words], capture_output=True, text=True, check=False,
                    timeout=PATIENCE_S,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                raise XvdError(
                    f"{client.name}: no end after {PATIENCE_S} s; it waits for the server"
                ) from None
            finally:
                # It keeps nothing that the image does not have; and QEMU 7.2, asked to terminate
                # while its iothread parts from a client, was seen to wait for ever.
                server.kill()
                server.communicate()
        if done.returncode:
            raise XvdError(f"{client.name}: {done.stderr.strip()}")
        found = json.loads(done.stdout)
        return Sample(
            found["operations"], found["seconds"], found["operations"] * job.size,
            front_ns=found["front_ns"], checksum="" if job.write_percent else found["checksum"],
        )  # fmt: skip

    return Case(name, measure)


def _server(image: Path, socket: Path) -> list[str]:
    return [
        "qemu-storage-daemon", "--object", "iothread,id=thread",
        "--blockdev", f"file,node-name=file,filename={image},aio=io_uring,cache.direct=on",
        "--blockdev", "raw,node-name=disk,file=file",
        "--export", "vhost-user-blk,id=export,node-name=disk,iothread=thread,writable=on,"
        f"addr.type=unix,addr.path={socket}",
    ]  # fmt: skip


def _qcow2_server(image: Path, socket: Path) -> list[str]:
    return [
        "qemu-storage-daemon",
        "--blockdev", f"file,node-name=file,filename={image},aio=io_uring,cache.direct=on",
        "--blockdev", "qcow2,node-name=disk,file=file,cache.direct=on,discard=unmap",
        "--export", "vhost-user-blk,id=export,node-name=disk,writable=on,"
        f"addr.type=unix,addr.path={socket}",
    ]  # fmt: skip


def _await(socket: Path, server: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not socket.exists():
        if server.poll() is not None:
            raise XvdError(f"qemu-storage-daemon: {server.communicate()[1].strip()}")
        if time.monotonic() > deadline:
            raise XvdError(f"qemu-storage-daemon: no socket after {PATIENCE_S} s")
        time.sleep(0.02)


# ---- The experiment --------------------------------------------------------------------------


METHOD = """An image of 256 MiB in tmpfs, opened with O_DIRECT; one queue, depth 32 for 4 KiB and 8
for 256 KiB. qemu-storage-daemon exports it by vhost-user-blk with one iothread, to a client by
libblkio in another process that sleeps when it has nothing to do, or never; its buffers are shared
with the server. xvd is frontend, ring and backend straight on the image, by two threads; its load
keeps its data in granted pages, and each end polls for as long as a sleep costs."""


def vhost_user(run: Run) -> Report:
    """The ring straight on an image, beside vhost-user-blk on it."""
    if lacking := missing("qemu-storage-daemon"):
        raise NotInstalled(*lacking)
    client = build_client(run.directory)
    small = Job(operations=run.operations(200_000), seed=run.seed)
    large = Job(
        size=256 << 10, depth=8, sequential=True, operations=run.operations(10_000), seed=run.seed
    )
    jobs = {
        "4 KiB random read": small,
        "4 KiB random write": replace(small, write_percent=100),
        "256 KiB sequential read": large,
    }
    # What is read has to stay as it is, or its checksum would prove nothing.
    images = {kind: image(run.directory, kind) for kind in ("read", "write")}
    cases = []
    for what, job in jobs.items():
        on = images[what.rpartition(" ")[2]]
        cases += [vhost(f"{how}: {what}", client, on, job, *f) for how, f in CLIENTS.items()]
        cases.append(case(f"xvd: {what}", Setup(f"file:{on}", job=replace(job, in_place=True))))
    try:
        return _report(list(jobs), run.measure(cases))
    finally:
        for on in images.values():
            on.unlink()


def _report(whats: Sequence[str], rounds: Rounds) -> Report:
    names = {
        "sleeping": "vhost-user-blk, client sleeps", "polling": "vhost-user-blk, client polls",
        "xvd": "xvd",
    }  # fmt: skip
    found = {key: {what: iops(rounds[f"{key}: {what}"]) for what in whats} for key in names}
    ratios = {
        how: {what: ratio(rounds, f"xvd: {what}", f"{how}: {what}") for what in whats}
        for how in CLIENTS
    }
    rows: list[tuple[Cell, ...]] = [
        (
            what, *(found[key][what] for key in names), mib(rounds[f"xvd: {what}"]),
            *(ratios[how][what] for how in CLIENTS),
        )
        for what in whats
    ]  # fmt: skip
    columns = ("", *(f"{name}: IOPS" for name in names.values()), "xvd: MiB/s",
               *(f"of the {how} client" for how in CLIENTS))  # fmt: skip
    return Report(
        "vhost-user",
        "The ring beside vhost-user-blk",
        METHOD.replace("\n", " "),
        [Table(columns, rows)],
        Plot("", "IOPS", {name: list(found[key].items()) for key, name in names.items()}),
        ratios={
            f"{what}, against a {how} client": value
            for how in CLIENTS
            for what, value in ratios[how].items()
        },
    )


def image(directory: Path, name: str) -> Path:
    """An image in memory with something in it."""
    where = Path("/dev/shm") if Path("/dev/shm").is_dir() else directory
    path = where / f"xvd-bench-vhost-{name}-{os.getpid()}.img"
    piece = bytes(range(256)) * 4096
    with path.open("wb") as file:
        for _ in range(IMAGE_SIZE // len(piece)):
            file.write(piece)
    return path
