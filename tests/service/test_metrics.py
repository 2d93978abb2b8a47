# SPDX-License-Identifier: Apache-2.0
"""The table of metrics, and what becomes of a daemon's figures."""

import re
from typing import Any

import pytest
from prometheus_client.metrics_core import Metric as Family

from xvd.backend.counters import BackCounters
from xvd.blkif.handshake import BackendState
from xvd.service.metrics import (
    BUCKETS,
    COUNTER,
    DISK_METRICS,
    LEFT_OUT,
    STATES,
    TABLES,
    Daemon,
    Disk,
    Scrape,
    disks_of,
    families,
)

METRICS = [metric for metrics, _ in TABLES for metric in metrics]


def told(disk: str = "1/xvda", state: str = "CONNECTED", **counters: Any) -> dict[str, Any]:
    return {"disk": disk, "state": state, "held": "", "paused": False, "counters": counters}


def daemon(*disks: dict[str, Any], name: str = "backend-0") -> Daemon:
    return Daemon(name, True, 0.25, {"version": "7", "started_s": 1.5}, disks)


def shown(*daemons: Daemon, names: dict[str, str] | None = None) -> list[Family]:
    scrape = Scrape(daemons, names or {}, {"names": 3}, "8")
    return list(families(scrape, disks_of(daemons)[0]))


def value(found: list[Family], metric: str, /, **labels: str) -> float | None:
    """The value of the one sample that has these labels, among others."""
    values = [
        sample.value
        for family in found
        for sample in family.samples
        if sample.name == metric and labels.items() <= sample.labels.items()
    ]
    assert len(values) <= 1, (metric, labels)
    return values[0] if values else None


# ---- The table ---------------------------------------------------------------------------------


def test_every_counter_of_a_backend_is_a_metric_or_is_left_out_for_a_reason() -> None:
    origins = " ".join(re.findall(r"`([\w ]+)`", " ".join(m.origin for m in DISK_METRICS)))

    named = {*origins.split(), *LEFT_OUT} & set(BackCounters.names())

    assert named == set(BackCounters.names())
    assert LEFT_OUT.keys() <= set(BackCounters.names())
    assert not LEFT_OUT.keys() & set(origins.split())


def test_every_state_of_a_backend_has_a_word() -> None:
    assert STATES.keys() == set(BackendState)


def test_names_are_as_prometheus_wants_them() -> None:
    names = [metric.name for metric in METRICS]

    assert len(set(names)) == len(names)
    assert [name for name in names if not re.fullmatch(r"xvd(_[a-z]+)+", name)] == []
    assert [m.name for m in METRICS if (m.kind == COUNTER) != m.name.endswith("_total")] == []
    assert [name for name in names if re.search(r"_(ms|us|ns|kib|mib|sectors)(_|$)", name)] == []
    assert [m.name for m in METRICS if not m.help.endswith((".", "1.", "names."))] == []


def test_the_number_of_series_goes_with_the_number_of_disks_alone() -> None:
    def series(disks: int) -> int:
        found = shown(daemon(*(told(f"{i}/xvda", refusals={"?": 1}) for i in range(disks))))
        return sum(len(family.samples) for family in found)

    each = series(2) - series(1)

    assert series(40) == series(1) + 39 * each
    assert each < 160


def test_no_metric_tells_an_images_name() -> None:
    found = shown(daemon(told() | {"image": "https://user:secret@host/x", "swapped_to": "secret"}))

    assert "secret" not in repr([family.samples for family in found])


# ---- Figures -----------------------------------------------------------------------------------


def test_bytes_are_bytes_and_requests_go_by_their_operation() -> None:
    found = shown(daemon(told(rd_req=5, rd_sect=16, wr_req=3)), names={"1": "web"})

    disk = {"domain": "1", "name": "web", "vdev": "xvda"}
    assert value(found, "xvd_disk_read_bytes_total", **disk) == 16 * 512
    assert value(found, "xvd_disk_requests_total", op="read", **disk) == 5
    assert value(found, "xvd_disk_requests_total", op="write", **disk) == 3
    assert value(found, "xvd_disk_requests_total", op="discard", **disk) == 0


def test_latencies_are_a_cumulative_histogram_in_seconds() -> None:
    counts = [0] * 40
    counts[3], counts[20], counts[39] = 7, 2, 1

    found = shown(daemon(told(latency={"read": counts}, latency_ns={"read": 2_500_000_000})))

    def below(bound: str) -> float | None:
        return value(found, "xvd_disk_request_duration_seconds_bucket", le=bound, op="read")

    assert below("8.192e-06") == 7
    assert below("0.001048576") == 7
    assert below("0.002097152") == 9
    assert below("17.179869184") == 9
    assert below("+Inf") == 10
    [family] = [it for it in found if it.name == "xvd_disk_request_duration_seconds"]
    assert len(family.samples) == 4 * (len(BUCKETS) + 3)
    assert value(found, "xvd_disk_request_duration_seconds_sum", op="read") == 2.5
    assert value(found, "xvd_disk_request_duration_seconds_count", op="read") == 10
    assert value(found, "xvd_disk_request_duration_seconds_sum", op="write") == 0


def test_a_daemon_of_a_version_without_sums_has_none() -> None:
    found = shown(daemon(told(latency={"read": [1] + [0] * 39})))

    assert value(found, "xvd_disk_request_duration_seconds_bucket", le="+Inf", op="read") == 1
    assert value(found, "xvd_disk_request_duration_seconds_sum", op="read") is None


def test_refusals_have_every_reason_from_the_beginning() -> None:
    found = shown(daemon(told(refusals={"read_only": 2, "of_another_version": 9})))

    assert value(found, "xvd_disk_refused_requests_total", reason="read_only") == 2
    assert value(found, "xvd_disk_refused_requests_total", reason="bad_grant") == 0
    assert value(found, "xvd_disk_refused_requests_total", reason="of_another_version") is None


@pytest.mark.parametrize(
    ("state", "word"),
    [("CONNECTED", "connected"), ("STARTING", "waiting"), ("LOST", "failed"), ("NEW", "")],
)
def test_a_disk_is_in_one_state(state: str, word: str) -> None:
    found = shown(daemon(told(state=state)))

    ones = [w for w in set(STATES.values()) if value(found, "xvd_disk_state", state=w) == 1]
    assert ones == ([word] if word else [])


def test_a_held_disk_and_a_paused_one_are_ones() -> None:
    found = shown(daemon(told() | {"held": "held until its storage is back"}))

    assert value(found, "xvd_disk_held") == 1
    assert value(found, "xvd_disk_paused") == 0


def test_of_a_disk_that_two_daemons_know_the_connected_one_is_shown() -> None:
    old = daemon(told(state="LEAVING", rd_req=1), name="backend-0")
    new = daemon(told(rd_req=2), name="backend-1")

    for daemons in ((old, new), (new, old)):
        found = shown(*daemons)

        assert value(found, "xvd_disk_requests_total", op="read") == 2
        assert value(found, "xvd_disk_info", daemon="backend-1") == 1


def test_figures_of_an_older_daemon_are_zeros_and_a_newer_ones_are_left_out() -> None:
    found = shown(daemon({"disk": "1/xvda", "counters": {"rd_req": 1, "new_figure": 2}}))

    assert value(found, "xvd_disk_requests_total", op="read") == 1
    assert value(found, "xvd_disk_storage_errors_total") == 0
    assert value(found, "xvd_disk_size_bytes") == 0


@pytest.mark.parametrize(
    "figures",
    [{"counters": {}}, {"disk": "xvda", "counters": {}}, {"disk": 7, "counters": {}},
     {"disk": "1/xvda", "counters": {"rd_req": "many"}}, {"disk": "1/xvda", "counters": []}, 7],
)  # fmt: skip
def test_figures_that_are_none_are_counted_and_cost_no_other_disk(figures: dict[str, Any]) -> None:
    disks, unreadable = disks_of([daemon(figures, told())])

    assert unreadable == 1
    assert [(disk.domain, disk.vdev) for disk in disks] == [("1", "xvda")]


def test_a_frontends_daemon_is_up_and_has_no_disk() -> None:
    front = daemon({"disk": "1/xvda", "frontend": {}}, name="nbd-1-51712")

    found = shown(front)

    assert disks_of([front]) == ([], 0)
    assert value(found, "xvd_up", daemon="nbd-1-51712") == 1


def test_a_daemon_that_does_not_answer_is_zero_and_tells_nothing() -> None:
    found = shown(Daemon("backend-0", False, 3.0))

    assert value(found, "xvd_up", daemon="backend-0") == 0
    assert value(found, "xvd_daemon_info") is None
    assert value(found, "xvd_daemon_start_time_seconds") is None
    assert value(found, "xvd_daemon_answer_duration_seconds") == 3


def test_a_host_without_daemons_has_metrics_too() -> None:
    found = shown()

    assert value(found, "xvd_daemons") == 0
    assert value(found, "xvd_exporter_errors_total", what="names") == 3
    assert value(found, "xvd_exporter_info", version="8") == 1


def test_a_disk_is_read_by_its_name() -> None:
    disk = Disk.of("backend-0", told("12/xvdb"))

    assert (disk.domain, disk.vdev) == ("12", "xvdb")
