# SPDX-License-Identifier: Apache-2.0
"""What the data path is measured beside: the C probe, fio on the file itself, and fio over NBD.

Each is a case like those of the ring. What is not installed is not measured, and said so.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xvd.bench.sample import Case, Sample
from xvd.errors import ConfigError
from xvd.frontend.load import Job
from xvd.packages import find_tool


class NotInstalled(ConfigError):
    """An experiment needs tools that are not there."""

    def __init__(self, *tools: str) -> None:
        super().__init__(f"this needs {', '.join(tools)}; install what is missing")


class NotShipped(NotInstalled):
    """An experiment needs the C source of a peer, which only this project's tree has."""

    def __init__(self, name: str) -> None:
        ConfigError.__init__(self, f"{name} is not in an installed xvd; run make bench in its tree")


def source_of(name: str) -> Path:
    """Return the path of a peer's C source; `NotShipped` where there is none."""
    path = Path(__file__).with_name(name)
    if not path.exists():
        raise NotShipped(name)
    return path


def build_probe(directory: Path) -> Path:
    """Compile the probe into a directory.

    Raises `ConfigError` without a C compiler, `NotShipped` without the source.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise ConfigError("no C compiler for the probe; install gcc")
    probe = directory / "probe"
    command = [compiler, "-O2", "-pthread", "-o", str(probe), str(source_of("probe.c"))]
    subprocess.run(command, check=True)
    return probe


def probe(name: str, path: Path, job: Job, *flags: str) -> Case:
    """The probe doing a job; flags: ``-p`` to poll, ``-z`` for a backend that copies nothing."""
    numbers = {
        "-n": job.operations,
        "-d": job.depth,
        "-b": job.size,
        "-w": job.write_percent,
        "-s": job.span,
        "-r": job.seed,
    }
    command = [str(path), *flags, *(str(part) for pair in numbers.items() for part in pair)]

    def measure() -> Sample:
        found = json.loads(_output(command))
        return Sample(
            operations=found["operations"],
            seconds=found["seconds"],
            bytes=found["operations"] * job.size,
            front_ns=found["front_ns"],
            back_ns=found["back_ns"],
            checksum=found["checksum"],
        )

    return Case(name, measure)


def missing(*tools: str) -> list[str]:
    """Return the tools that are not installed."""
    return [tool for tool in tools if find_tool(tool) is None]


def _output(command: Sequence[str] | str) -> str:
    """Return what a command prints; its complaint becomes ours."""
    done = subprocess.run(
        command, shell=isinstance(command, str), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ConfigError(f"{command}: {done.stderr.strip()[-500:]}")
    return done.stdout


def _fio(job: Job, seconds: float, *options: str) -> list[str]:
    kind = "write" if job.write_percent == 100 else "rw" if job.write_percent else "read"
    rw = kind if job.sequential else f"rand{kind}"
    return [
        "fio", "--name=x", f"--rw={rw}", f"--bs={job.size}", f"--iodepth={job.depth}",
        f"--rwmixwrite={job.write_percent}", f"--size={job.span}", f"--randseed={job.seed}",
        "--norandommap=1", "--time_based", f"--runtime={seconds}", "--thread",
        "--output-format=json", *options,
    ]  # fmt: skip


def _sample(text: str, size: int) -> Sample:
    found: dict[str, Any] = json.loads(text[text.index("{") :])["jobs"][0]
    sides = (found["read"], found["write"])
    operations = sum(side["total_ios"] for side in sides)
    seconds = max(side["runtime"] for side in sides) / 1000
    cpu = (found["usr_cpu"] + found["sys_cpu"]) / 100 * seconds
    return Sample(
        operations, seconds, operations * size, errors=found["error"],
        front_ns=cpu / operations * 1e9,
    )  # fmt: skip


def fio_file(name: str, path: Path, job: Job, seconds: float, *, direct: bool) -> Case:
    """fio by io_uring straight on a file."""
    options = (f"--filename={path}", "--ioengine=io_uring", f"--direct={int(direct)}")
    return Case(name, lambda: _sample(_output(_fio(job, seconds, *options)), job.size))


def fio_rbd(name: str, pool: str, image: str, job: Job, seconds: float) -> Case:
    """fio's own engine for an image of the cluster of ``$CEPH_CONF``."""
    where = ("--ioengine=rbd", "--clientname=admin", f"--pool={pool}", f"--rbdname={image}")
    return Case(name, lambda: _sample(_output(_fio(job, seconds, *where)), job.size))


SERVERS = {
    "nbdkit": "nbdkit -U - file {image} --run {run}",
    "qemu-nbd": "qemu-nbd -f {format} --cache={cache} --aio=io_uring -k {socket} -t {image} & "
    "pid=$!; "
    "while ! test -S {socket}; do sleep 0.02; done; uri=nbd+unix:///?socket={socket}; "
    "sh -c {run}; status=$?; kill $pid; wait $pid; rm -f {socket}; exit $status",
    "xvd serve": "{xvd} serve {image} --run {run}",
}
"""What serves an image over NBD while a command runs with ``$uri``: its command line."""
OF_A_DISK = {"xvd nbd": "{xvd} nbd 1 xvda --host {image} --run {run}"}
"""What so serves a disk of a host."""


def fio_nbd(
    name: str, server: str, image: Path, job: Job, seconds: float, *, image_format: str = "raw"
) -> Case:
    """fio's NBD engine on what one of these serves, an image by O_DIRECT where it can."""
    fio = " ".join(_fio(job, seconds, "--ioengine=nbd", '--uri="$uri"'))
    found = f"{image}.json"
    run = f"'{fio} --output={found} >/dev/null'"
    words = {
        "image": image,
        "run": run,
        "socket": f"{image}.sock",
        "cache": "none",
        "format": image_format,
        "xvd": f"{sys.executable} -m xvd.cli",
    }
    command = f"export uri; {(SERVERS | OF_A_DISK)[server].format_map(words)}"

    def measure() -> Sample:
        _output(command)
        text = Path(found).read_text()
        Path(found).unlink()
        return _sample(text, job.size)

    return Case(name, measure)
