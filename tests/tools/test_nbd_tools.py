# SPDX-License-Identifier: Apache-2.0
"""What others wrote, against a disk that goes through the whole machine: libnbd's tools, QEMU's,
fio; on memory and on a file."""

import json
import random
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from nbd_support import run, try_run
from served_disk import Served, served_disk

pytestmark = pytest.mark.tools

SIZE = 64 << 20


def make_image(path: Path, size: int, seed: int) -> Path:
    """A sparse file with random patches, of any alignment."""
    rng = random.Random(seed)
    with path.open("wb") as file:
        file.truncate(size)
        for _ in range(64):
            length = rng.randrange(1, 1 << 18)
            file.seek(rng.randrange(size - length))
            file.write(rng.randbytes(length))
    return path


def target(kind: str, directory: Path, size: int) -> str:
    if kind == "memory":
        return f"memory:{size}"
    image = directory / "disk.img"
    with image.open("wb") as file:
        file.truncate(size)
    return str(image)


@pytest.fixture(params=["memory", "file"])
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Served]:
    """On memory as by ``xvd nbd``; on a file as by ``xvd serve``, with the storage at hand."""
    where, at_hand = target(request.param, tmp_path, SIZE), request.param == "file"
    with served_disk(where, tmp_path, name="disk", at_hand=at_hand) as disk:
        yield disk


def tells_holes(served: Served) -> bool:
    assert served.rig.engine is not None
    return served.rig.engine.info.tells_holes


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return make_image(tmp_path / "source", SIZE, seed=1)


def test_nbdinfo_tells_what_the_disk_is(served: Served) -> None:
    (export,) = json.loads(run("nbdinfo", "--json", served.uri))["exports"]
    assert {
        "export-name": "disk",
        "export-size": SIZE,
        "is_read_only": False,
        "can_flush": True,
        "can_fua": True,
        "can_multi_conn": True,
        "can_trim": True,
        "can_zero": True,
        "can_fast_zero": True,
        "can_df": True,
        "block_size_minimum": 1,
        "block_size_maximum": 32 << 20,
    }.items() <= export.items()
    assert export.get("contexts", []) == ["base:allocation"] * tells_holes(served)


def test_nbdinfo_lists_the_export_with_its_description(tmp_path: Path) -> None:
    with served_disk("memory:1M", tmp_path, name="xvda", description="a guest's root") as served:
        listed = json.loads(run("nbdinfo", "--list", "--json", served.uri))
    assert [(e["export-name"], e["description"]) for e in listed["exports"]] == [
        ("xvda", "a guest's root")
    ]


@pytest.mark.parametrize(
    ("question", "yes"), [("connect", True), ("write", False), ("trim", False), ("cache", False)]
)
def test_nbdinfo_about_a_read_only_disk(tmp_path: Path, question: str, yes: bool) -> None:
    with served_disk("memory:1M", tmp_path, options="access=ro,") as served:
        assert (try_run("nbdinfo", "--can", question, served.uri).returncode == 0) == yes


def test_nbdinfo_maps_data_and_holes(tmp_path: Path) -> None:
    where = target("file", tmp_path, SIZE)
    with served_disk(where, tmp_path, at_hand=True) as served:
        run("qemu-io", "-f", "raw", "-c", "write -P 7 1M 64k", served.uri)
        mapped = json.loads(run("nbdinfo", "--map", "--json", served.uri))
    assert [(m["offset"], m["length"], m["description"]) for m in mapped] == [
        (0, 1 << 20, "hole,zero"),
        (1 << 20, 65536, "data"),
        ((1 << 20) + 65536, SIZE - (1 << 20) - 65536, "hole,zero"),
    ]


def test_nbdinfo_is_told_nothing_where_it_is_not_known(tmp_path: Path) -> None:
    with served_disk("memory:1M", tmp_path) as served:
        assert try_run("nbdinfo", "--map", served.uri).returncode != 0


@pytest.mark.slow
def test_a_sparse_copy_is_sparse(tmp_path: Path) -> None:
    source = tmp_path / "source"
    with source.open("wb") as file:
        file.truncate(SIZE)
        file.seek(1 << 20)
        file.write(b"d" * 65536)
    copy = Path(target("file", tmp_path, SIZE))
    with served_disk(str(copy), tmp_path, at_hand=True) as served:
        run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, served.uri)
    run("cmp", source, copy)
    assert copy.stat().st_blocks == 128


@pytest.mark.slow
def test_nbdcopy_there_and_back(served: Served, image: Path, tmp_path: Path) -> None:
    run("nbdcopy", "--flush", image, served.uri)
    run("nbdcopy", served.uri, tmp_path / "back")
    run("cmp", image, tmp_path / "back")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["memory", "file"])
def test_nbdcopy_of_a_gibibyte(kind: str, tmp_path: Path) -> None:
    source = make_image(tmp_path / "source", 1 << 30, seed=2)
    with served_disk(target(kind, tmp_path, 1 << 30), tmp_path) as served:
        run("nbdcopy", "--flush", source, served.uri)
        run("nbdcopy", served.uri, tmp_path / "back")
    run("cmp", source, tmp_path / "back")


@pytest.mark.slow
def test_qemu_img_convert_and_compare(served: Served, image: Path, tmp_path: Path) -> None:
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", image, served.uri)
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", image, served.uri)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", served.uri, tmp_path / "q")
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", image, tmp_path / "q")


def test_qemu_img_info_and_map(served: Served) -> None:
    info = json.loads(run("qemu-img", "info", "--output=json", served.uri))
    mapped = json.loads(run("qemu-img", "map", "--output=json", served.uri))
    assert info["virtual-size"] == SIZE
    data = not tells_holes(served)
    assert [(m["start"], m["length"], m["data"]) for m in mapped] == [(0, SIZE, data)]


def test_qemu_io_patterns(served: Served) -> None:
    commands = (
        *("write -P 0x5a 0 1M", "write -P 0xa5 -f 1000 3001", "aio_write -P 1 2M 64k"),
        *("aio_write -P 2 3M 64k", "aio_flush", "flush", "write -z 512 512", "write -z -u 4M 2M"),
        *("discard 8M 1M", "read -P 0x5a 1024 0", "read -P 0 512 488", "read -P 0xa5 1024 2977"),
        *("read -P 0x5a 4001 1044575", "read -P 1 2M 64k", "read -P 2 3M 64k", "read -P 0 4M 2M"),
    )
    words = [word for command in commands for word in ("-c", command)]
    said = run("qemu-io", "-f", "raw", *words, served.uri)
    assert "Pattern verification failed" not in said


@pytest.mark.slow
@pytest.mark.parametrize(("pattern", "size"), [("randwrite", "4k"), ("write", "300k")])
def test_fio_verifies_what_it_wrote(
    served: Served, tmp_path: Path, pattern: str, size: str
) -> None:
    run(
        *("fio", "--name=v", "--ioengine=nbd", f"--uri={served.uri}", f"--rw={pattern}"),
        *(
            f"--bs={size}",
            "--size=16M",
            "--iodepth=32",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--verify_state_save=0",
        ),
        "--fsync=64",
        *("--output-format=json", f"--output={tmp_path / 'out'}"),
    )
    (job,) = json.loads((tmp_path / "out").read_text())["jobs"]
    assert job["error"] == 0
    assert job["read"]["total_ios"] == job["write"]["total_ios"] > 0


@pytest.mark.slow
def test_several_tools_at_once_do_not_disturb_each_other(served: Served, tmp_path: Path) -> None:
    failures: list[BaseException] = []

    def verify(number: int) -> None:
        try:
            run(
                *("fio", "--name=v", "--ioengine=nbd", f"--uri={served.uri}", "--rw=randwrite"),
                *("--bs=4k", "--size=4M", f"--offset={number * 4}M", "--iodepth=16"),
                *(
                    "--verify=crc32c",
                    "--verify_fatal=1",
                    "--verify_state_save=0",
                    f"--output={tmp_path / f'o{number}'}",
                ),
            )
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=verify, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.slow
def test_fio_does_not_notice_that_the_backend_is_restarted(tmp_path: Path) -> None:
    image = target("file", tmp_path, SIZE)
    command = (
        *("fio", "--name=v", "--ioengine=nbd", "--rw=randwrite", "--bs=4k", "--size=32M"),
        *("--iodepth=16", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0"),
        f"--output={tmp_path / 'out'}",
    )
    with served_disk(image, tmp_path) as served:
        fio = threading.Thread(target=lambda: done.append(try_run(*command, f"--uri={served.uri}")))
        done: list[subprocess.CompletedProcess[str]] = []
        fio.start()
        restarts = 0
        while fio.is_alive():
            written = served.call(counters(served))["bytes_written"]
            if written > (restarts + 1) * (4 << 20):  # in the middle of the work, each time
                served.call(served.rig.restart_backend())
                restarts += 1
        fio.join()
    assert done[0].returncode == 0, done[0].stdout + done[0].stderr
    assert restarts >= 5


def test_a_tool_over_tcp(served: Served) -> None:
    uri = served.call(served.server.listen_tcp(port=0))
    said = run("qemu-io", "-f", "raw", "-c", "write -P 7 0 64k", "-c", "read -P 7 0 64k", uri)
    assert "Pattern verification failed" not in said


LIBNBD = """
h.add_meta_context("base:allocation")
h.connect_uri(uri)
assert h.can_meta_context("base:allocation") == tells_holes
h.pwrite(b"x" * 1000, 12345, nbd.CMD_FLAG_FUA)
h.zero(100, 12400)
h.flush()
assert h.pread(1000, 12345) == b"x" * 55 + bytes(100) + b"x" * 845
if tells_holes:
    extents = []
    h.block_status(65536, 0, lambda name, offset, found, error: extents.extend(found))
    assert extents == [12288, 3, 4096, 0, 49152, 3], extents
h.trim(65536, 0)
h.set_strict_mode(0)
try:
    h.pread(512, h.get_size())
except nbd.Error as error:
    assert error.errno == "EINVAL", error
else:
    raise AssertionError("read past the end")
h.shutdown()
"""


def test_libnbd_from_python(served: Served) -> None:
    known = f"tells_holes = {tells_holes(served)}"
    run("nbdsh", "-c", f"uri = {served.uri!r}", "-c", known, "-c", LIBNBD)
    assert served.call(counters(served))["rejected"] == 1


async def counters(served: Served) -> dict[str, int]:
    return served.server.counters()
