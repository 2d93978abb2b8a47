# SPDX-License-Identifier: Apache-2.0
"""``xvd load``, and ``xvd bench`` in its tiny form."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from ceph import POOL, running_cluster
from xvd_process import run_xvd

from xvd.bench.experiments import EXPERIMENTS

LOAD = ("load", "--json", "--operations", "500", "--runs", "2")


def load(*options: str) -> dict[str, Any]:
    result = run_xvd(*LOAD, *options)
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_a_load_is_shaped_as_fios_jobs() -> None:
    jobs = load("--engine", "memory:1M", "--span", "1M")["jobs"]

    assert [job["error"] for job in jobs] == [0, 0]
    assert [job["read"]["total_ios"] for job in jobs] == [500, 500]
    assert [job["write"]["total_ios"] for job in jobs] == [0, 0]


@pytest.mark.parametrize("mode", ["persistent", "mapping", "copy"])
def test_the_checksum_is_of_data_that_moved(mode: str) -> None:
    options = ("--span", "1M", "--mode", mode, "--engine")
    first, again = (one["checksum"] for one in load(*options, "memory:1M")["xvd"])
    nothing = load(*options, "null:1M")["xvd"][0]["checksum"]

    assert first == again != nothing == "0" * 16


def test_a_verifying_load_of_storage_that_forgets_fails() -> None:
    result = run_xvd(*LOAD, "--span", "1M", "--engine", "null:1M", "--verify")

    assert result.returncode == 1


def test_an_experiment_that_does_not_exist() -> None:
    result = run_xvd("bench", "speed")

    assert result.returncode == 2
    assert "no experiment 'speed'" in result.stderr


@contextmanager
def rbd_image(requires_tool: Callable[[str], str], place: Path) -> Iterator[dict[str, str]]:
    """The variables that name images of a cluster."""
    with running_cluster(place / "ceph", requires_tool) as cluster:
        for name in ("read", "write"):
            cluster.image(name, 64 << 20)
        images = f"{POOL}/read,{POOL}/write"
        yield {"CEPH_CONF": str(cluster.conf), "XVD_BENCH_RBD": images}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_in_its_tiny_form_makes_a_page(
    name: str, tmp_path: Path, requires_tool: Callable[[str], str]
) -> None:
    page = tmp_path / "benchmarks.md"
    with rbd_image(requires_tool, tmp_path) if name == "cluster" else nullcontext({}) as variables:
        result = run_xvd("bench", name, "--tiny", "--json", "--out", str(page), **variables)
    if "not to be had" in result.stderr and os.environ.get("XVD_REQUIRE_TOOLS") != "1":
        pytest.skip(result.stderr)

    assert result.returncode == 0, result.stderr
    (found,) = json.loads(result.stdout)["experiments"]
    assert found["experiment"] == name
    assert all(table for table in found["tables"])
    assert f"`xvd bench {name}`" in page.read_text()
    assert (tmp_path / "benchmarks" / f"{name}.svg").stat().st_size > 1000
