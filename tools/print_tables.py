# SPDX-License-Identifier: Apache-2.0
"""Print the tables of the code into the pages that show them, or check what is there.

Usage: ``print_tables.py --write`` replaces what stands between the marks of each table,
``print_tables.py --check`` exits with 1 when that is not what would be written.
"""

import sys
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from xvd.backend.iotune import IoTune  # noqa: E402
from xvd.backend.settings import Settings as BackendSettings  # noqa: E402
from xvd.blkif.features import FEATURES  # noqa: E402
from xvd.blkif.operations import OPERATIONS  # noqa: E402
from xvd.frontend.settings import Settings as FrontendSettings  # noqa: E402
from xvd.service.metrics import (  # noqa: E402
    DAEMON_LABELS,
    DAEMON_METRICS,
    DISK_METRICS,
    EXPORTER_METRICS,
    Metric,
)
from xvd.xenbus.settings import Setting, SettingsBase  # noqa: E402


def rows(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """Return a table of Markdown."""
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"|{''.join(f' {cell}'.rstrip() + ' |' for cell in line)}\n" for line in lines)


def settings(of: type[SettingsBase], without: Container[str] = ()) -> str:
    """Return the table of one end's settings, or of those that are in no other table."""
    defaults = {one.name: one.default for one in fields(of)}
    body = [
        (
            f"`{name}`", row.usual or _shown(defaults[name]),
            span(row),
            *(["yes" if row.live else ""] if any_live(of) else []), row.whose, row.meaning,
        )
        for name, row in of.table().items() if name not in without
    ]  # fmt: skip
    live = ["live"] if any_live(of) else []
    return rows(["name", "default", "range", *live, "whose", "what it does"], body)


def _shown(default: object) -> str:
    """Return a default as a cell; a switch's is 0 or 1."""
    return str(int(default) if isinstance(default, bool) else default)


def any_live(of: type[SettingsBase]) -> bool:
    """Whether there is one that may be changed while a disk is connected."""
    return any(row.live for row in of.table().values())


def span(row: Setting) -> str:
    """Return which values there are."""
    if row.pattern:
        return "a name"
    if row.words or row.is_switch or row.choices:
        return ", ".join(map(str, row.words or row.choices or (0, 1)))
    return f"{row.low} to {_power(row.high)}"


def _power(number: int) -> str:
    """Return a large number as a power of two or of ten, if it is one."""
    if number >= 1 << 20 and number & (number - 1) == 0:
        return f"2^{number.bit_length() - 1}"
    digits = str(number)
    zeros = len(digits) - 1
    return f"10^{zeros}" if zeros >= 9 and digits.rstrip("0") == "1" else digits


def features() -> str:
    """Return the table of what a backend offers."""
    operations = {row.feature: row.op.name for row in OPERATIONS} | {"discard-secure": "secure"}
    body = [
        (
            f"`{row.node}`", "InitWait" if row.early else "Connected", row.needs,
            operations.get(row.node, ""), "yes" if row.stands else "",
        )
        for row in FEATURES
    ]  # fmt: skip
    return rows(["node", "published with", "if it has", "offers", "stands for a successor"], body)


def metrics(of: Sequence[Metric], common: Sequence[str] = ()) -> str:
    """Return a table of what is exported to Prometheus; common: labels to name in each row."""
    body = [
        (
            f"`{metric.name}`", metric.kind,
            ", ".join(f"`{label}`" for label in (*common, *metric.labels)),
            metric.help, metric.origin,
        )
        for metric in of
    ]  # fmt: skip
    return rows(["metric", "type", "labels", "what it is", "figure of"], body)


TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "backend settings": ("docs/settings.md", lambda: settings(BackendSettings, IoTune.table())),
    "limits": ("docs/settings.md", lambda: settings(IoTune)),
    "frontend settings": ("docs/settings.md", lambda: settings(FrontendSettings)),
    "features": ("docs/protocol.md", features),
    "metrics of disks": ("docs/metrics.md", lambda: metrics(DISK_METRICS)),
    "metrics of daemons": ("docs/metrics.md", lambda: metrics(DAEMON_METRICS, DAEMON_LABELS)),
    "metrics of the host": ("docs/metrics.md", lambda: metrics(EXPORTER_METRICS)),
}
"""The page and the table of each mark."""


def main(arguments: list[str]) -> int:
    stale = False
    for mark, (page, table) in TABLES.items():
        path = ROOT / page
        head = f"<!-- tools/print_tables.py: {mark} -->\n"
        text = path.read_text()
        before, found, rest = text.partition(head)
        _, end, after = rest.partition("<!-- end -->\n")
        if not found or not end:
            print(f"{page} has no place for: {mark}", file=sys.stderr)
            return 1
        fresh = f"{before}{head}{table()}{end}{after}"
        if arguments == ["--write"]:
            path.write_text(fresh)
        elif fresh != text:
            print(f"{page} is stale: run tools/print_tables.py --write", file=sys.stderr)
            stale = True
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
