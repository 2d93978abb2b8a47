# SPDX-License-Identifier: Apache-2.0
"""The verbs at work, as real processes."""

import json
import mmap
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from xvd_process import Daemon, FourProcesses, run_xvd

from xvd.cli.doctor import page_size
from xvd.cli.serve import split_ends
from xvd.cli.verbs import VERBS
from xvd.engines.uri import LAYERS, SCHEMES

pytestmark = pytest.mark.slow


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.touch()
    os.truncate(path, 64 << 20)
    return path


@pytest.fixture
def four(tmp_path: Path, image: Path) -> Iterator[FourProcesses]:
    with FourProcesses(tmp_path, image) as processes:
        yield processes


def test_serve_passes_the_commands_status_on(image: Path) -> None:
    result = run_xvd("serve", str(image), "--run", "exit 7")

    assert result.returncode == 7


def test_serve_without_a_command_prints_the_uri_and_ends_on_sigterm(image: Path) -> None:
    with Daemon("serve", str(image)) as daemon:
        assert daemon.line.startswith("nbd+unix:///?socket=")

        assert daemon.stop() == 0


def test_serve_leaves_nothing_in_tmp(image: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()

    run_xvd("serve", str(image), "--run", "true", TMPDIR=str(scratch))

    assert list(scratch.iterdir()) == []


def test_serve_reports_what_happened(image: Path, requires_tool) -> None:
    qemu_io = requires_tool("qemu-io")
    command = f'{qemu_io} -f raw -c "write -P 5 0 1M" -c flush "$uri"'

    result = run_xvd("serve", str(image), "--report", "--run", command)

    assert result.returncode == 0
    assert "1 ring page, persistent grants" in result.stderr
    assert "1.0 MiB written" in result.stderr


def test_serve_by_grant_copy(image: Path, requires_tool) -> None:
    qemu_io = requires_tool("qemu-io")
    command = f'{qemu_io} -f raw -c "write -P 5 0 1M" -c "read -P 5 0 1M" "$uri"'

    result = run_xvd("serve", "--copy", str(image), "--report", "--run", command)

    assert result.returncode == 0
    assert "grant copy" in result.stderr


def test_sigterm_ends_the_captive_command_too(image: Path) -> None:
    with Daemon("serve", str(image), "--run", "echo up; exec sleep 1000") as daemon:
        assert daemon.stop() == 128 + signal.SIGTERM


def test_four_processes_serve_a_disk(four: FourProcesses, requires_tool) -> None:
    qemu_io = requires_tool("qemu-io")
    four.run("list")

    result = subprocess.run(
        [qemu_io, "-f", "raw", "-c", "write -P 9 1M 1M", "-c", "read -P 9 1M 1M", four.uri],
        check=False, capture_output=True, text=True,
    )  # fmt: skip

    assert result.returncode == 0, result.stdout
    rows = json.loads(four.run("list", "--json").stdout)
    assert [(r["guest"], r["vdev"], r["frontend_state"], r["backend_state"]) for r in rows] == [
        (1, "xvda", "connected", "connected")
    ]


def test_stats_count_under_blkbacks_names(four: FourProcesses, requires_tool) -> None:
    qemu_io = requires_tool("qemu-io")
    command = [qemu_io, "-f", "raw", "-c", "write 0 64K", "-c", "flush", four.uri]
    subprocess.run(command, check=True, capture_output=True)

    figures = json.loads(four.run("stats", "--json").stdout)

    counters = figures["backend-0"][0]["counters"]
    assert counters["wr_sect"] == 128
    assert counters["f_req"] >= 1
    assert sum(counters["latency"]["write"]) == counters["wr_req"]
    assert counters["persistent_misses"] > 0
    assert counters["refusals"] == {}


def test_a_disk_is_resized_while_it_is_used(four: FourProcesses, image: Path) -> None:
    larger = four.run("resize", "1", "xvda", "80M")
    smaller = four.run("resize", "1", "xvda", "32M")
    shrunk = four.run("resize", "1", "xvda", "32M", "--shrink")
    os.truncate(image, 48 << 20)
    followed = four.run("resize", "1", "xvda")

    sizes = [result.stdout.strip() for result in (larger, shrunk, followed)]
    assert sizes == [str(size << 20) for size in (80, 32, 48)]
    assert (smaller.returncode, "--shrink" in smaller.stderr) == (2, True)


def test_a_disk_is_paused_swapped_and_resumed_while_it_is_used(
    four: FourProcesses, image: Path, tmp_path: Path, requires_tool
) -> None:
    qemu_io, size = requires_tool("qemu-io"), image.stat().st_size
    other, small = tmp_path / "other.img", tmp_path / "small.img"
    other.write_bytes(b"o" * size)
    small.write_bytes(b"s" * 4096)
    rows = []
    for words in (("pause",), ("swap", str(other)), ("resume",)):
        verb, *more = words
        done = four.run(verb, "1", "xvda", *more)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        rows.append(json.loads(four.run("list", "--json").stdout)[0])
    refused = four.run("swap", "1", "xvda", str(small))
    command = [qemu_io, "-f", "raw", "-c", f"read -P {ord('o')} 0 4096", four.uri]
    read = subprocess.run(command, check=True, capture_output=True, text=True)

    assert [(row["backend_state"], row["target"]) for row in rows] == [
        ("paused", str(image)), ("paused", str(other)), ("connected", str(other)),
    ]  # fmt: skip
    assert (refused.returncode, refused.stderr) == (
        1, f"xvd: 1/xvda: {small} does not fit: it has 4096 bytes and the disk {size}\n"
    )  # fmt: skip
    assert "verification failed" not in read.stdout


def test_a_disk_that_nobody_serves_is_not_resized(four: FourProcesses) -> None:
    result = four.run("resize", "1", "xvdz", "1G")

    assert result.returncode == 1
    assert "no daemon serves the disk" in result.stderr


def test_top_shows_every_disk(four: FourProcesses) -> None:
    result = four.run("top", "--count", "2", "--interval", "0.1")

    assert result.returncode == 0
    assert "1/xvda     alive" in result.stdout
    assert "p99 us" in result.stdout


def test_settings_are_shown_and_changed(four: FourProcesses) -> None:
    shown = four.run("set")
    changed = four.run("set", "max_queues=1", "log_stats=Y", "--json")
    refused = four.run("set", "max_queues=many")

    assert "max_persistent_grants" in shown.stdout
    [values] = json.loads(changed.stdout).values()
    assert (values["max_queues"], values["log_stats"]) == (1, 1)
    assert (refused.returncode, "from 0 to 1024" in refused.stderr) == (2, True)


def test_disks_share_the_limits_of_a_group(four: FourProcesses) -> None:
    limited = four.run("group", "gold", "total_iops_sec=5000", "read_bytes_sec=1000000")
    joined = four.run("set", "--disk", "1/xvda", "group_name=gold", "write_iops_sec=70", "--json")
    shown = four.run("group")
    [told] = json.loads(four.run("group", "--json").stdout).values()
    [figures] = json.loads(four.run("stats", "--json").stdout)["backend-0"]
    refused = four.run("group", "gold", "total_iops_sec_max=10")
    unknown = four.run("group", "gold", "iops=10")

    limits = "read_bytes_sec=1000000 total_iops_sec=5000"
    assert (limited.returncode, limited.stderr) == (0, "")
    assert limited.stdout == f"backend-0      gold             -; {limits}\n"
    assert json.loads(joined.stdout)["backend-0"]["group_name"] == "gold"
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout == f"backend-0      gold             1/xvda; {limits}\n"
    assert told["gold"]["disks"] == ["1/xvda"]
    assert (figures["limits"], figures["group"]) == ({"write_iops_sec": 70}, "gold")
    assert (refused.returncode, refused.stdout, refused.stderr) == (
        2, "", "xvd: total_iops_sec_max is 10; a burst is more than total_iops_sec, 5000\n"
    )  # fmt: skip
    assert (unknown.returncode, "'iops=10' sets nothing" in unknown.stderr) == (2, True)


def test_a_backend_begins_with_the_limits_it_is_told(tmp_path: Path, image: Path) -> None:
    options = ("--set", "1/xvda:group_name=gold", "--group", "gold:total_iops_sec=9")
    with FourProcesses(tmp_path, image, *options) as processes:
        [told] = json.loads(processes.run("group", "--json").stdout).values()

    assert told == {"gold": {"limits": {"total_iops_sec": 9}, "disks": ["1/xvda"]}}


def test_a_backend_begins_with_what_it_is_told(tmp_path: Path, image: Path) -> None:
    options = ("--set", "max_queues=2", "--set", "1/xvda:max_ring_page_order=0")
    with FourProcesses(tmp_path, image, *options) as processes:
        shown = json.loads(processes.run("set", "--json").stdout)
        own = json.loads(processes.run("set", "--disk", "1/xvda", "--json").stdout)

    [values], [of_one] = shown.values(), own.values()
    assert (values["max_queues"], values["max_ring_page_order"]) == (2, 4)
    assert (of_one["max_queues"], of_one["max_ring_page_order"]) == (2, 0)


def test_detach_ends_the_frontend_and_removes_every_node(four: FourProcesses) -> None:
    result = four.run("detach", "1", "xvda")

    assert result.returncode == 0, result.stderr
    assert four.nbd.process.wait(30) == 1
    assert four.run("list", "--json").stdout == "[]\n"


def test_everything_ends_on_sigterm_and_leaves_nothing(four: FourProcesses) -> None:
    for daemon in (four.nbd, four.backend, four.host):
        assert daemon.stop() == 0

    assert list(four.directory.iterdir()) == []


def test_a_backend_that_is_stopped_leaves_its_disks_to_the_next(
    four: FourProcesses, requires_tool
) -> None:
    qemu_io = requires_tool("qemu-io")
    four.backend.stop()
    four.start_backend()

    command = [qemu_io, "-f", "raw", "-c", "read 0 1M", four.uri]
    result = subprocess.run(command, check=False, timeout=60)

    assert result.returncode == 0


def test_doctor_finds_this_machine_fit() -> None:
    result = run_xvd("doctor", "--json")

    assert result.returncode == 0
    assert json.loads(result.stdout)["fit"] is True


def test_doctor_says_how_many_disks_there_is_room_for_and_what_ends_first() -> None:
    disks = json.loads(run_xvd("doctor", "--json").stdout)["disks"]

    assert set(disks["backend"]) == {"mappings", "grants", "memory", "descriptors"}
    assert disks["backend"][disks["limited_by"]] == min(disks["backend"].values())
    assert disks["frontend"]["xenstore nodes"] > 0


@pytest.mark.parametrize(
    ("size", "detail", "remedy"),
    [
        (4096, "4 KiB, as Xen's", ""),
        (65536, "64 KiB, each for 4 KiB of a disk", "pool_pages"),
    ],
)
def test_doctor_says_what_large_pages_cost(
    size: int, detail: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mmap, "PAGESIZE", size)

    found = page_size()

    assert found.ok
    assert found.detail.startswith(detail)
    assert remedy in found.remedy


def test_sim_prints_seed_and_options_first() -> None:
    result = run_xvd("sim", "--seed", "5")

    assert result.returncode == 0
    assert result.stdout.startswith("seed 5: ")


@pytest.mark.parametrize("verb", VERBS)
def test_help(verb: str) -> None:
    assert run_xvd(verb, "--help").returncode == 0


def test_help_says_what_there_is_to_serve_and_to_put_in_front() -> None:
    words = run_xvd("serve", "--help").stdout.replace("│", " ").split()
    text = " ".join(words)

    for served in {scheme.help for scheme in SCHEMES.values()}:
        forms = ", ".join(scheme.form for scheme in SCHEMES.values() if scheme.help == served)
        assert f"{forms} ({served})" in text
    for layer in LAYERS.values():
        assert f"{layer.example} ({layer.help})" in text


def test_serve_and_compare(image: Path, tmp_path: Path, requires_tool) -> None:
    qemu_img = requires_tool("qemu-img")
    image.write_bytes(bytes(range(256)) * 4096)
    other = tmp_path / "other.img"
    other.write_bytes(image.read_bytes())

    same = run_xvd("serve", str(image), "--run", f"{qemu_img} compare -f raw $uri {other}")
    other.write_bytes(bytes(1 << 20))
    differs = run_xvd("serve", str(image), "--run", f"{qemu_img} compare -f raw $uri {other}")

    assert (same.returncode, differs.returncode) == (0, 1)


def test_serve_with_settings_of_both_ends(image: Path) -> None:
    options = ("--set", "max_queues=2", "--set", "max_ring_page_order=2",
               "--set", "back:feature_persistent=N", "--set", "front:page_size=65536")  # fmt: skip

    result = run_xvd("serve", "-v", *options, str(image), "--run", "true")

    assert result.returncode == 0
    assert re.search(r"connected \(.*, mapping, queues: 2, ring pages: 4\)", result.stderr)


@pytest.mark.parametrize(
    ("texts", "back", "front"),
    [
        (["max_queues=2"], ["max_queues=2"], ["max_queues=2"]),
        (["back:max_queues=2", "page_size=65536"], ["max_queues=2"], ["page_size=65536"]),
        (["front:max_queues=2", "log_stats=Y"], ["log_stats=Y"], ["max_queues=2"]),
    ],
)
def test_a_setting_is_of_the_ends_that_have_it(
    texts: list[str], back: list[str], front: list[str]
) -> None:
    assert split_ends(texts) == (back, front)


@pytest.mark.parametrize("text", ["max_queue=2", "middle:max_queues=2", "page_size"])
def test_a_setting_of_neither_end_is_a_mistake(image: Path, text: str) -> None:
    result = run_xvd("serve", "--set", text, str(image), "--run", "true")

    assert result.returncode == 2, result.stderr
    assert text in result.stderr


def test_serve_a_block_device(image: Path, requires_tool) -> None:
    losetup = requires_tool("losetup")
    qemu_io = requires_tool("qemu-io")
    if os.geteuid() != 0:
        pytest.skip("a loop device needs root")
    command = [losetup, "-f", "--show", str(image)]
    device = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    try:
        actions = '-c "write -P 3 1M 64K" -c flush -c "discard 2M 1M" -c "read -P 3 1M 64K"'
        result = run_xvd("serve", device, "--run", f'{qemu_io} -f raw {actions} "$uri"')
    finally:
        subprocess.run([losetup, "-d", device], check=True)

    assert result.returncode == 0, result.stdout
    assert image.read_bytes()[1 << 20 : (1 << 20) + 65536] == b"\3" * 65536
