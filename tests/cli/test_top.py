# SPDX-License-Identifier: Apache-2.0
"""Rates from two polls at a disk's figures."""

from typing import Any

from xvd.cli.rates import rates


def disk(**counters: Any) -> dict[str, Any]:
    return {"disk": "backend/vbd/1/51712", "counters": counters}


def histogram(**buckets: int) -> list[int]:
    counts = [0] * 40
    for bucket, count in buckets.items():
        counts[int(bucket.removeprefix("b"))] = count
    return counts


def test_rates_are_what_was_added_by_the_second() -> None:
    before = disk(rd_req=100, wr_req=10, rd_sect=800, wr_sect=80, storage_errors=1)
    after = disk(rd_req=300, wr_req=30, rd_sect=2_000_800, wr_sect=80, storage_errors=5)
    row = rates(before, after, 2.0)
    assert (row.reads, row.writes, row.read_mb, row.write_mb, row.errors) == (100, 10, 512, 0, 2)


def test_latencies_are_those_of_the_interval() -> None:
    before = disk(latency={"read": histogram(b30=1000), "write": histogram(b30=1000)})
    after = disk(
        latency={"read": histogram(b30=1000, b9=98), "write": histogram(b30=1000, b9=1, b19=1)}
    )
    row = rates(before, after, 1.0)
    assert (row.p50_us, row.p99_us) == (1.024, 1.024)
    row = rates(
        before, disk(latency={"read": histogram(b30=1001), "write": histogram(b30=1000)}), 1
    )
    assert row.p50_us == 2**31 / 1000


def test_how_well_persistent_grants_serve() -> None:
    row = rates(disk(), disk(persistent_hits=75, persistent_misses=25), 1.0)
    assert row.kept_percent == 75


def test_a_disk_that_did_nothing_is_all_zeros() -> None:
    row = rates({}, disk(), 1.0)
    assert (row.reads, row.p50_us, row.p99_us, row.kept_percent, row.refused) == (0, 0, 0, 0, 0)


def test_a_daemon_that_began_anew_does_not_count_backwards() -> None:
    row = rates(disk(rd_req=1000, refusals={"read_only": 3}), disk(rd_req=5, refusals={}), 1.0)
    assert (row.reads, row.refused) == (0, 0)
