# SPDX-License-Identifier: Apache-2.0
"""Debian's package in dom0: installed, upgraded while a guest uses its disk, and removed."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from xen_host import COMPLAINTS, VERIFY, Backend, Slot, domu, sh, typed

PACKAGE = os.environ.get("XVD_PACKAGE", "")
"""What `make deb` has made for this Debian, which `make xen` gives to dom0 if it is there."""
PROGRAM = Path("/usr/bin/xvd")

pytestmark = pytest.mark.skipif(not PACKAGE, reason="make deb SUITE=... first")


def dpkg(*words: str) -> "subprocess.CompletedProcess[str]":
    """The rig's root has what packages depend on, but not as packages."""
    command = ["dpkg", "--force-depends", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def install(package: object) -> None:
    done = dpkg("--install", str(package))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def newer(tmp_path: Path) -> Path:
    """The same package of a higher version, which it also says of itself."""
    tree, package = tmp_path / "newer", tmp_path / "newer.deb"
    sh(f"dpkg-deb --raw-extract {PACKAGE} {tree}")
    sh(f"sed -i 's/^Version: .*/&+1/' {tree}/DEBIAN/control")
    [place] = tree.glob("usr/lib/xvd/lib/*/site-packages/xvd/__init__.py")
    sh(f"""sed -i 's/^__version__ = "[^"]*/&+1/' {place}""")
    sh(f"dpkg-deb -Znone --root-owner-group --build {tree} {package}")
    return package


@pytest.fixture
def installed() -> Iterator[str]:
    """The package, in the place of the rig's hotplug script; what it says of its version."""
    script = Path("/etc/xen/scripts/block-xvd")
    kept = script.rename(script.with_suffix(".kept"))
    try:
        install(PACKAGE)
        yield sh(f"{PROGRAM} --version").strip()
        dpkg("--purge", "xvd")
    finally:
        kept.rename(script)


@pytest.fixture
def backend(installed: str, tmp_path: Path) -> Iterator[Backend]:
    """The package's."""
    assert installed
    daemon = Backend(tmp_path, str(PROGRAM))
    daemon.start()
    yield daemon
    assert daemon.stop() == 0, daemon.log()


@pytest.mark.timeout(1500)
@pytest.mark.usefixtures("guests")
def test_it_is_upgraded_while_a_guest_uses_its_disk_and_not_removed(
    installed: str, backend: Backend, newer: Path, best_slot: Slot, image: Path
) -> None:
    domu("-n", "u1", "-b", "-d", best_slot.line(image))
    typed("u1", f"(({VERIFY} --loops=20; echo $? > /tmp/status) > /tmp/log 2>&1 &)")

    install(newer)
    assert backend.stop() == 0
    backend.start()

    assert sh(f"{PROGRAM} --version").strip() == f"{installed}+1"
    assert sh("readlink /proc/$(pgrep -of 'xvd backend')/exe").startswith("/usr/bin/python3")
    refused = dpkg("--remove", "xvd")
    assert refused.returncode == 1
    domid = sh("xl domid u1").strip()
    assert f"guests use these disks, and would wait for them for ever: {domid}/xvda" in (
        refused.stderr
    )
    typed("u1", "while ! [ -e /tmp/status ]; do sleep 1; done")
    assert typed("u1", "cat /tmp/status").split() == ["0"]
    typed("u1", f"! {COMPLAINTS}")


def test_nothing_is_left_of_it(installed: str) -> None:
    assert installed.startswith("xvd ")
    owned = sh("dpkg --listfiles xvd").split()

    done = dpkg("--purge", "xvd")

    assert done.returncode == 0, done.stdout + done.stderr
    left = [path for path in owned if Path(path).is_file()]
    assert left == []
    assert not Path("/usr/lib/xvd").exists()
    assert not Path("/run/xvd").exists()
