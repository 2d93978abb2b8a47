# SPDX-License-Identifier: Apache-2.0
"""What debian/ says again is what stands elsewhere. `make deb` builds the package, and tries it."""

import re
import tomllib
from pathlib import Path
from typing import Any

import xvd

ROOT = Path(__file__).resolve().parents[1]
DEBIAN = ROOT / "debian"


def toml(name: str) -> dict[str, Any]:
    return tomllib.loads((ROOT / name).read_text())


def test_there_is_one_version() -> None:
    changelog = (DEBIAN / "changelog").read_text()
    meson = (ROOT / "meson.build").read_text()
    versions = [
        *re.findall(r"^xvd \((.*)\)", changelog)[:1],
        *re.findall(r"version: '([\d.]+)', meson_version", meson),
        toml("pyproject.toml")["project"]["version"],
    ]

    assert versions == [xvd.__version__] * 3


def bundled() -> set[str]:
    """The packages that uv.lock has for xvd[top], on Linux."""
    packages = {it["name"]: it for it in toml("uv.lock")["package"]}
    own = packages["xvd"]
    todo = [*own["dependencies"], *own["optional-dependencies"]["top"]]
    done: list[Any] = []
    while todo:
        one = todo.pop()
        if "win32" in one.get("marker", "") or one in done:
            continue
        done.append(one)
        package = packages[one["name"]]
        todo += package.get("dependencies", [])
        for extra in one.get("extra", []):
            todo += package["optional-dependencies"][extra]
    return {one["name"] for one in done}


def test_the_copyright_names_all_that_is_in_the_environment() -> None:
    comment = (DEBIAN / "copyright").read_text().partition("\n\nFiles:")[0]
    named = set(re.findall(r"^  (\S+)", comment, re.MULTILINE))

    assert named == bundled()


def test_all_of_contrib_is_in_the_package() -> None:
    listed = set(re.findall(r"^(contrib/\S+) ", (DEBIAN / "xvd.install").read_text(), re.MULTILINE))
    linked = {
        str(path.resolve().relative_to(ROOT)) for path in DEBIAN.iterdir() if path.is_symlink()
    }
    contrib = {str(path.relative_to(ROOT)) for path in (ROOT / "contrib").rglob("*")
               if path.is_file()}  # fmt: skip

    assert listed | linked == contrib
    assert not listed & linked


def test_every_unit_is_restarted_and_stopped_by_the_package() -> None:
    units = {path.name.removeprefix("xvd.") for path in DEBIAN.glob("xvd.*.service")}
    rules = (DEBIAN / "rules").read_text()
    stopped = (DEBIAN / "xvd.prerm").read_text()

    assert {f"{name}.service" for name in re.findall(r"--name=(\S+)", rules)} == units
    assert {unit for unit in units if unit not in stopped} == set()
