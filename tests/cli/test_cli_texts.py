# SPDX-License-Identifier: Apache-2.0
"""The text form of every verb that answers: its exit status and its whole output."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from xvd_process import Daemon, FourProcesses, run_xvd

from xvd.cli.verbs import VERBS

pytestmark = pytest.mark.slow

NUMBER = r"\s+\d+"


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FourProcesses]:
    directory = tmp_path_factory.mktemp("texts")
    image = directory / "disk.img"
    image.touch()
    os.truncate(image, 8 << 20)
    with FourProcesses(directory, image) as processes:
        yield processes


SETTINGS = """\
backend-0      max_ring_page_order                     4
backend-0      max_queues                              0
backend-0      max_indirect_segments                 256
backend-0      feature_persistent                      1
backend-0      max_persistent_grants                1056 live
backend-0      scale_persistent_grants                 0 live
backend-0      persistent_grant_unused_seconds        60 live
backend-0      max_buffer_pages                     1024 live
backend-0      buffer_squeeze_duration_ms             10 live
backend-0      log_stats                               0 live
backend-0      on_error                           report live
backend-0      poll_us                                 - ?
backend-0      holdoff_us                              0
backend-0      large_sectors                           0
backend-0      total_bytes_sec                         0 live
backend-0      read_bytes_sec                          0 live
backend-0      write_bytes_sec                         0 live
backend-0      total_iops_sec                          0 live
backend-0      read_iops_sec                           0 live
backend-0      write_iops_sec                          0 live
backend-0      total_bytes_sec_max                     0 live
backend-0      read_bytes_sec_max                      0 live
backend-0      write_bytes_sec_max                     0 live
backend-0      total_iops_sec_max                      0 live
backend-0      read_iops_sec_max                       0 live
backend-0      write_iops_sec_max                      0 live
backend-0      total_bytes_sec_max_length              1 live
backend-0      read_bytes_sec_max_length               1 live
backend-0      write_bytes_sec_max_length              1 live
backend-0      total_iops_sec_max_length               1 live
backend-0      read_iops_sec_max_length                1 live
backend-0      write_iops_sec_max_length               1 live
backend-0      size_iops_sec                           0 live
backend-0      group_name                              - live
"""
HEADS = r"daemon +state +disk +rd_req +wr_req +f_req +ds_req +oo_req +rd_sect +wr_sect +errors\n"
TOP_HEADS = (
    "disk +state +rd/s +wr/s +rd MB/s +wr MB/s +p99 us +p50 us +busy +errors/s +refused/s +kept %\n"
)
LIST_HEADS = "disk +backend mode frontend +backend +daemon target\n"

ANSWERS = [
    (("set",), SETTINGS),
    (("set", "max_queues=0"), SETTINGS),
    (("stats",), HEADS + rf"backend-0 +alive +1/xvda{NUMBER * 8}\n"),
    (("list",), LIST_HEADS + r"1/xvda +0 w +connected +connected +alive +\S+/disk\.img\n"),
    (("resize", "1", "xvda"), "8388608\n"),
    (("pause", "1", "xvda"), ""),
    (("resume", "1", "xvda"), ""),
    (("top", "--count", "1", "--interval", "0.05"), TOP_HEADS + r"1/xvda +alive[ \d.]+\n"),
]


@pytest.mark.parametrize(("words", "wanted"), ANSWERS, ids=lambda it: " ".join(it)[:40])
def test_a_verb_answers_in_text(four: FourProcesses, words: tuple[str, ...], wanted: str) -> None:
    result = four.run(*words)

    assert (result.returncode, result.stderr) == (0, "")
    assert re.fullmatch(wanted, result.stdout), result.stdout


def test_domain_0_may_have_a_disk(four: FourProcesses) -> None:
    """In one test: which of several runs first is nobody's promise."""
    for words, wanted in (
        (("attach", "0", "vdev=xvdb,target=null:1M"), ""),
        (("resize", "0", "xvdb"), "1048576\n"),
        (("detach", "0", "xvdb"), ""),
    ):
        result = four.run(*words)

        assert (result.returncode, result.stderr, result.stdout) == (0, "", wanted)


ALONE = [
    (("--version",), r"xvd [\d.]+\n"),
    (("serve", "memory:1M", "--run", "echo $uri"), r"nbd\+unix:///\?socket=/\S+/nbd\.sock\n"),
    (("serve", "memory:1M", "--tcp", "0", "--run", "echo $uri"), r"nbd://127\.0\.0\.1:[1-9]\d+/\n"),
    (("load", "--engine", "memory:1M", "--span", "1M", "--operations", "9"),
     r"memory:1M, 4096 bytes, random, depth 32, 0% writes: [\d,]+ IOPS, [\d,]+ MiB/s, "
     r"front [\d,]+ ns/op, back [\d,]+ ns/op, errors 0, checksum [0-9a-f]{16}\n"),
    (("sim", "--seed", "5", "--steps", "50"), r"seed 5: [^\n]+\npassed: \d+ operations, [^\n]+\n"),
    (("sim", "--world", "devices", "--seed", "5", "--steps", "50"),
     r"seed 5: [^\n]+\npassed: \d+ operations, [^\n]+\n"),
    (("doctor",), r"((ok|absent|MISSING) +[^\n]+ for [^\n]+\n)+"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "wanted"), ALONE, ids=lambda it: " ".join(it)[:40])
def test_a_verb_that_needs_no_host_answers_in_text(words: tuple[str, ...], wanted: str) -> None:
    result = run_xvd(*words)

    assert (result.returncode, result.stderr) == (0, "")
    assert re.fullmatch(wanted, result.stdout), result.stdout


ARGUMENTS = {
    "serve": ["null:1M"], "attach": ["1", "vdev=xvdc,target=null:1M"], "detach": ["1", "xvdc"],
    "resize": ["1", "xvda"], "nbd": ["1", "xvda"], "top": ["--count", "1", "--interval", "0.05"],
    "load": ["--operations", "9", "--engine", "null:1M", "--span", "1M"],
    "bench": ["instructions", "--tiny"], "group": ["gold", "total_iops_sec=9"],
    "sim": ["--steps", "9"], "mirror": ["1", "xvda"], "backup": ["1", "xvda"],
    "disk": ["info", "1", "xvda"], "config": ["show"], "datapath": ["Plugin.Query", "<<<{}"],
}  # fmt: skip
SILENT = ("attach", "detach", "pause", "resume", "swap", "snapshot")
LASTING = ("host", "backend", "nbd", "exporter")


@pytest.mark.parametrize("how", [">&-", ">/dev/full", "| head -c 0"])
@pytest.mark.parametrize("verb", [v for v in VERBS if v not in LASTING + SILENT])
def test_output_that_nobody_takes_is_a_line_at_most(
    four: FourProcesses, verb: str, how: str
) -> None:
    words = [sys.executable, "-m", "xvd.cli", verb, *ARGUMENTS.get(verb, [])]
    shell = f"{' '.join(words)} {how}; exit ${{PIPESTATUS[0]}}"

    result = subprocess.run(
        ["bash", "-c", shell], capture_output=True, text=True, check=False, timeout=60,
        env={**os.environ, "XVD_HOST": str(four.directory)},
    )  # fmt: skip

    if how.startswith("|"):  # whoever wrote before the reader had gone has not noticed
        assert result.returncode in (0, 1)
        assert result.stderr == ""
    else:
        assert result.returncode == 1
        assert re.fullmatch(r"xvd: standard output: [^\n\[]+\n", result.stderr), result.stderr


MISTAKES = [
    (("serve", "null:1M", "--vdev", "nope", "--run", "true"), "'nope' names no virtual device"),
    (("serve", "null:1.3K", "--run", "true"), "'1.3K' is no whole number of bytes"),
    (("serve", "null:1.5K1", "--run", "true"), "'1.5K1' is no size"),
    (("serve", "null:1M", "--layer", "delay:raed=1ms", "--run", "true"),
     "layer delay has no option raed; its options are read, write, flush, discard"),
    (("serve", "null:1M", "--layer", "readonly:x=1", "--run", "true"), "it has none"),
    (("serve", "null:1M", "--tcp", "0.0.0.0:0", "--run", "true"), "say --allow-remote"),
    (("serve", "null:1M", "--tcp", "[::]:0", "--run", "true"), "unauthenticated"),
    (("serve", "null:1M", "--set", "max_queue=1", "--run", "true"), "max_queues"),
    (("backend", "--kind", "vdb"), "there is no kind 'vdb'; there are vbd, vbd3"),
    (("load", "--mode", "mapped"), "there are persistent, mapping, copy"),
    (("set", "max_queue=1"), "max_queues"),
    (("exporter", "--listen", "0.0.0.0:0"), "reads the figures of every guest"),
    (("exporter", "--listen", ""), "HOST:PORT, PORT or unix:PATH"),
    (("exporter", "--listen", "nowhere"), "write HOST:PORT"),
    (("exporter", "--listen", "unix:/nonexistent/x"), "cannot listen there"),
    (("exporter", "--textfile", "xvd.txt"), "name it NAME.prom"),
    (("exporter", "--interval", "5"), "scrape_interval"),
    (("attach", "1", "vdev=xvdd,acess=r,target=null:1M"), "access"),
    (("attach", "1", "vdev=xvdd,access=x,target=null:1M"), "there are r, ro, w, rw"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "named"), MISTAKES, ids=lambda it: " ".join(it)[:40])
def test_a_mistake_is_told_with_what_is_right(
    four: FourProcesses, words: tuple[str, ...], named: str
) -> None:
    result = run_xvd(*words, XVD_HOST=str(four.directory))

    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(r"xvd: [^\n]+\n", result.stderr), result.stderr
    assert "[Errno" not in result.stderr
    assert named in result.stderr


def test_an_address_that_others_reach_is_told_to_be_open() -> None:
    result = run_xvd(
        "serve", "null:1M", "--tcp", "0.0.0.0:0", "--allow-remote", "--run", "echo $uri"
    )

    assert result.returncode == 0
    assert re.fullmatch(r"nbd://0\.0\.0\.0:[1-9]\d+/\n", result.stdout)
    assert re.fullmatch(r"xvd: warning: 0\.0\.0\.0:0: NBD is unauthenticated [^\n]+\n",
                        result.stderr)  # fmt: skip


def test_both_uris_are_printed() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "xvd.cli", "serve", "null:1M", "--tcp", "0"],
        stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        lines = [process.stdout.readline(), process.stdout.readline()]
        process.terminate()

    assert lines[0].startswith("nbd+unix:///?socket=")
    assert re.fullmatch(r"nbd://127\.0\.0\.1:[1-9]\d+/\n", lines[1])
    assert process.returncode == 0


def test_a_load_beyond_the_disk_keeps_to_the_disk() -> None:
    result = run_xvd("load", "--engine", "memory:1M", "--operations", "500", "--verify")

    assert result.returncode == 0
    assert ", errors 0, " in result.stdout
    assert result.stderr == "xvd: the disk has 1048576 bytes, and the span no more than those\n"


def test_top_keeps_to_sixty_columns(four: FourProcesses) -> None:
    words = ("top", "--count", "1", "--interval", "0.05", "--host", str(four.directory))

    result = run_xvd(*words, COLUMNS="60")

    lines = result.stdout.splitlines()
    assert [len(line) <= 60 for line in lines] == [True, True]
    assert lines[0].split()[:4] == ["disk", "state", "rd/s", "wr/s"]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_every_signal_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    os.environ["TMPDIR"] = str(tmp_path)
    try:
        with Daemon("serve", "null:1M", "--run", "echo $$; exec sleep 1000") as daemon:
            daemon.process.send_signal(number)
            status = daemon.process.wait(20)
    finally:
        del os.environ["TMPDIR"]

    assert status == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(int(daemon.line), 0)


def test_ctrl_c_while_a_verb_is_loaded_ends_it_by_the_signal() -> None:
    code = """
import os, signal, sys
from xvd.cli import app, commands
load = commands.import_module
commands.import_module = lambda name: (os.kill(os.getpid(), signal.SIGINT), load(name))[1]
sys.argv = ["xvd", "list"]
sys.exit(app.run())
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)

    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")
