# SPDX-License-Identifier: Apache-2.0
"""Print the tables of the code into the pages that show them, or check what is there.

Usage: ``print_tables.py --write`` replaces what stands between the marks of each table,
``print_tables.py --check`` exits with 1 when that is not what would be written.
"""

import json
import sys
import textwrap
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
from xvd.service.configuration import TABLES as TABLES_OF_FILE  # noqa: E402
from xvd.service.configuration import Ceiling, Daemon, meaning, takes  # noqa: E402
from xvd.service.metrics import (  # noqa: E402
    DAEMON_LABELS,
    DAEMON_METRICS,
    DISK_METRICS,
    EXPORTER_METRICS,
    Metric,
)
from xvd.xenbus.log import EVENTS  # noqa: E402
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


def events() -> str:
    """Return the table of what a line in the journal may be about."""
    return rows(["XVD_EVENT", "meaning"], [(f"`{name}`", text) for name, text in EVENTS.items()])


def file_tables() -> str:
    """Return the table of what the daemon's own tables of its file may have."""
    body = [
        (f"`[{table}]`", f"`{name}`", takes(TABLES_OF_FILE[table][0], name),
         meaning(TABLES_OF_FILE[table][0], name))
        for table in ("daemon", "budget") for name in TABLES_OF_FILE[table][0].__struct_fields__
    ]  # fmt: skip
    return rows(["table", "name", "takes", "what it is"], body)


EXAMPLE_HEAD = """\
# SPDX-License-Identifier: Apache-2.0
# Settings of `xvd backend`: the file is /etc/xvd/xvd.toml (docs/running.md). Each line that begins
# with a name says what holds anyway, or is an example: take its # away to set it.
#
#     xvd config check                whether the file is in order
#     systemctl reload xvd-backend    lets a change hold
"""
EXAMPLES: dict[str, tuple[str, str]] = {
    "daemon": ("The daemon itself: all but log_level holds from its next start on.", ""),
    "budget": ("The most that all disks together may keep of this host; unset: what there is.", ""),
    "settings": (
        "Every disk. What is live holds at once, the rest from a guest's next connection on.",
        "",
    ),
    "groups": (
        "Limits that the disks of a group share; a disk is in it by group_name.",
        "[groups.gold]\ntotal_iops_sec = 5000\ntotal_bytes_sec = 104857600\n",
    ),
    "disks": (
        "One disk, by its guest's name or number. All of [settings] may stand here.",
        '[disks."web/xvda"]\ngroup_name = "gold"\non_error = "hold"\n'
        '[disks."1/xvdb"]\nread_iops_sec = 500\n',
    ),
}
"""What stands before each table of the example, and what is in one that has no names of its own."""


OF_THE_MACHINE = {
    "mappings": 40_000, "grants": 100_000, "memory": 1 << 30, "descriptors": 10_000, "poll_us": 50,
}  # fmt: skip
"""Examples of what has no default of its own."""


def example() -> str:
    """Return the example of a file of settings: all that may stand in it, commented out."""
    text = EXAMPLE_HEAD
    for table, (head, body) in EXAMPLES.items():
        text += f"\n{commented(head)}"
        if body:
            text += "".join(f"#{line}\n" for line in body.splitlines())
            continue
        of = TABLES_OF_FILE[table][0]
        text += f"[{table}]\n"
        for name in of.__struct_fields__:
            live = ", live" if table == "settings" and BackendSettings.table()[name].live else ""
            text += commented(meaning(of, name))
            text += f"#{name} = {toml(usual(table, name))}  # {takes(of, name)}{live}\n"
    return text


def usual(table: str, name: str) -> object:
    """Return a name's default, or an example where that is the machine's affair."""
    defaults = {"budget": Ceiling, "settings": BackendSettings, "daemon": Daemon}[table]()
    default = getattr(defaults, name)
    return OF_THE_MACHINE[name] if default is None else default


def commented(text: str) -> str:
    """Return a text as comments."""
    lines = textwrap.wrap(text, 97)
    return "".join(f"# {line}\n" for line in lines)


def toml(value: object) -> str:
    """Return a value as TOML has it: as JSON, for what a setting may be."""
    return json.dumps(value)


FILES: dict[str, Callable[[], str]] = {"contrib/xvd.toml": example}
"""Files that are made whole."""

TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "backend settings": ("docs/settings.md", lambda: settings(BackendSettings, IoTune.table())),
    "limits": ("docs/settings.md", lambda: settings(IoTune)),
    "frontend settings": ("docs/settings.md", lambda: settings(FrontendSettings)),
    "tables of xvd.toml": ("docs/running.md", file_tables),
    "events": ("docs/running.md", events),
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
    for name, text_of in FILES.items():
        path = ROOT / name
        if arguments == ["--write"]:
            path.write_text(text_of())
        elif not path.exists() or path.read_text() != text_of():
            print(f"{name} is stale: run tools/print_tables.py --write", file=sys.stderr)
            stale = True
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
