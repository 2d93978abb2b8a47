# SPDX-License-Identifier: Apache-2.0
"""What the dashboard and the alerts of contrib/ ask of Prometheus."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONTRIB = Path(__file__).parents[2] / "contrib"
DASHBOARD = CONTRIB / "grafana" / "xvd.json"
RULES = CONTRIB / "prometheus" / "xvd.rules.yml"

_SERIES = re.compile(r"\b(xvd_\w+)(?:\{([^}]*)\})?")
_VARIABLES = {"$__rate_interval": "1m", "$instance": ".*", "$guest": ".*", "$vdev": ".*"}
"""What Grafana puts in the place of each."""


@dataclass(frozen=True, slots=True)
class Query:
    """An expression of PromQL, where it stands, and the labels that its legend shows."""

    where: str
    expr: str
    shown: tuple[str, ...] = ()

    @property
    def series(self) -> dict[str, set[str]]:
        """Each metric that is named, and the labels that are asked of it."""
        found: dict[str, set[str]] = {}
        for name, selectors in _SERIES.findall(self.expr):
            labels = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selectors)
            found.setdefault(name, set()).update(labels)
        return found

    @property
    def grouped(self) -> set[str]:
        """The labels by which results are grouped or matched, and those of the legend."""
        lists = re.findall(r"\b(?:by|on|without|ignoring)\s*\(([^)]*)\)", self.expr)
        return {label.strip() for text in lists for label in text.split(",")} | set(self.shown)

    @property
    def plain(self) -> str:
        """The expression without Grafana's variables."""
        text = self.expr
        for name, value in _VARIABLES.items():
            text = text.replace(name, value)
        return text


def dashboard_queries() -> list[Query]:
    """Every expression of the dashboard, and that of each of its variables."""
    dashboard = json.loads(DASHBOARD.read_text())
    variables = [it for it in dashboard["templating"]["list"] if it["type"] == "query"]
    return [*_panels(dashboard["panels"]), *map(_variable, variables)]


def _panels(panels: list[dict[str, Any]]) -> Iterator[Query]:
    for panel in panels:
        for target in panel.get("targets", ()):
            shown = re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])
            yield Query(panel["title"], target["expr"], tuple(shown))


def _variable(variable: dict[str, Any]) -> Query:
    series, label = re.fullmatch(
        r"label_values\((.*), (\w+)\)", variable["query"]["query"]
    ).groups()  # type: ignore[union-attr]
    return Query(variable["name"], series, (label,))


def alert_queries() -> list[Query]:
    """The expression of every alert; lines that are folded are joined."""
    rules = re.split(r"^      - alert: ", RULES.read_text(), flags=re.MULTILINE)[1:]
    found = []
    for rule in rules:
        [expr] = re.findall(r"^        expr: (.*\n(?: {10}.*\n)*)", rule, re.MULTILINE)
        shown = re.findall(r"\$labels\.(\w+)", rule)
        found.append(Query(rule.split()[0], " ".join(expr.lstrip("|").split()), tuple(shown)))
    return found
