# SPDX-License-Identifier: Apache-2.0
"""A backend with a disk in a Ceph cluster, as real processes."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from ceph import running_cluster
from xvd_process import FourProcesses

pytestmark = [pytest.mark.slow, pytest.mark.tools]

SIZE = 64 << 20


def test_a_backend_that_is_killed_under_load_has_a_successor_that_writes_at_once(
    tmp_path: Path, requires_tool: Callable[[str], str]
) -> None:
    fio, output = requires_tool("fio"), tmp_path / "fio.json"
    with (
        running_cluster(tmp_path / "ceph", requires_tool) as cluster,
        FourProcesses(tmp_path, cluster.image("killed", SIZE)) as four,
    ):
        load = subprocess.Popen(
            [fio, "--name=v", "--ioengine=nbd", f"--uri={four.uri}", "--rw=randwrite",
             "--bs=4k", "--iodepth=32", f"--size={SIZE}", "--verify=crc32c", "--fsync=64",
             "--rate_iops=2000", "--max_latency=15s", "--output-format=json",
             f"--output={output}"],
            stdout=subprocess.DEVNULL,
            cwd=tmp_path,
        )  # fmt: skip
        for _ in range(3):
            four.backend.kill()
            four.start_backend()
        assert load.wait(100) == 0
    text = output.read_text()
    assert json.loads(text[text.index("{") :])["jobs"][0]["error"] == 0
