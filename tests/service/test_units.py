# SPDX-License-Identifier: Apache-2.0
"""The units in contrib/: systemd understands them, and gives them few rights."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from xvd.cli.verbs import VERBS

CONTRIB = Path(__file__).resolve().parents[2] / "contrib"
UNITS = {
    "xvd-backend.service": 29,
    "xvd-backend-driverdomain.service": 29,
    "xvd-exporter.service": 13,
}
"""Each unit, and ten times the exposure that `systemd-analyze security` may find."""


def test_every_unit_is_looked_at() -> None:
    assert {path.name for path in CONTRIB.glob("*.service")} == UNITS.keys()


def analyze(tool: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [tool, *words], check=False, capture_output=True, text=True,
        env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", **variables},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("unit", UNITS)
def test_systemd_understands_every_line(
    unit: str, tmp_path: Path, requires_tool: Callable[[str], str]
) -> None:
    """Without Xen's own units too, which Debian does not have."""
    tool = requires_tool("systemd-analyze")
    (tmp_path / unit).write_text((CONTRIB / unit).read_text())

    done = analyze(
        tool, "verify", "--man=no", str(tmp_path / unit), SYSTEMD_UNIT_PATH=f"{tmp_path}:"
    )

    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_exposes_no_more_than_it_says(
    unit: str, requires_tool: Callable[[str], str]
) -> None:
    tool, limit = requires_tool("systemd-analyze"), UNITS[unit]

    done = analyze(
        tool, "security", "--offline=yes", "--no-pager", f"--threshold={limit}", str(CONTRIB / unit)
    )

    assert done.returncode == 0, done.stdout
    assert f"gives {limit / 10}" in (CONTRIB / unit).read_text()


@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_runs_a_verb_and_is_watched(unit: str) -> None:
    text = (CONTRIB / unit).read_text()

    assert set(re.findall(r"^ExecStart=/usr/bin/env xvd (\w+)", text, re.M)) <= VERBS.keys()
    assert "\nType=notify\n" in text
    assert "\nWatchdogSec=" in text


def rights(unit: str) -> list[str]:
    """The lines of a unit's section of what it may not do."""
    return (CONTRIB / unit).read_text().partition("# ---- What it may not do.")[2].splitlines()


def test_both_backends_have_the_same_rights() -> None:
    assert rights("xvd-backend.service") == rights("xvd-backend-driverdomain.service") != []
