# SPDX-License-Identifier: Apache-2.0
"""The dashboard and the alerts name metrics and labels that there are."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from monitoring import DASHBOARD, RULES, Query, alert_queries, dashboard_queries

from xvd.service.metrics import HISTOGRAM, TABLES

HERE = Path(__file__).parent
TARGET = {"instance", "job"}
"""Labels that a Prometheus server gives to whatever it scrapes."""

LABELS = {
    metric.name + ("_bucket" if metric.kind == HISTOGRAM else ""): {
        *common, *metric.labels, *TARGET, *(["le"] if metric.kind == HISTOGRAM else [])
    }
    for metrics, common in TABLES
    for metric in metrics
}  # fmt: skip
"""What a query may name: each series, and its labels."""

QUERIES = [*dashboard_queries(), *alert_queries()]


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.where)
def test_a_query_names_metrics_and_labels_that_there_are(query: Query) -> None:
    assert query.series
    assert query.series.keys() <= LABELS.keys()
    for name, labels in query.series.items():
        assert labels <= LABELS[name], name
    assert query.grouped <= set().union(*(LABELS[name] for name in query.series))


def test_a_query_of_what_is_not_there_is_found() -> None:
    query = Query("test", 'sum by (op, colour) (rate(xvd_disk_read_total{vdev="a",x!="b"}[5m]))')

    assert query.series == {"xvd_disk_read_total": {"vdev", "x"}}
    assert query.grouped == {"op", "colour"}


def test_every_metric_is_on_the_dashboard_or_is_of_little_use_there() -> None:
    shown = {name for query in dashboard_queries() for name in query.series}

    assert LABELS.keys() - shown == {
        "xvd_daemons", "xvd_disk_size_bytes", "xvd_disk_queues", "xvd_disk_ring_pages",
        "xvd_disk_persistent_grants_purged_total", "xvd_disk_grant_calls_total",
        "xvd_disk_queue_steps_total",
    }  # fmt: skip


def test_panels_have_numbers_of_their_own_and_do_not_overlap() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"])
                 for y in range(at["y"], at["y"] + at["h"])}  # fmt: skip
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_every_alert_is_shown_to_fire() -> None:
    tested = re.findall(r'ALERTS\{alertname="(\w+)"', (HERE / "alerts.test.yml").read_text())

    assert sorted(tested) == sorted(query.where for query in alert_queries())


def test_the_page_has_every_alert() -> None:
    page = (HERE.parents[1] / "docs" / "metrics.md").read_text()

    assert set(re.findall(r"`(Xvd\w+)`", page)) == {query.where for query in alert_queries()}


@pytest.mark.tools
def test_prometheus_takes_the_rules_and_fires_them_when_it_should(requires_tool) -> None:
    promtool = requires_tool("promtool")

    for words in (("check", "rules", RULES), ("test", "rules", HERE / "alerts.test.yml")):
        done = subprocess.run([promtool, *words], capture_output=True, text=True, check=False)

        assert (done.returncode, done.stderr) == (0, ""), done.stdout
        assert "SUCCESS" in done.stdout
