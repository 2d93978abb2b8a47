# SPDX-License-Identifier: Apache-2.0
"""Tests that need a real Xen host, and run in its dom0 as root: `make xen` brings one up.

Everywhere else they are skipped, with that reason. The host must be like the rig's: xl works, no
xen-blkback is loaded, block-xvd is installed, and `domu` boots guests.
"""

import contextlib
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from xen_host import Backend, Disk, Slot, backend_nodes, sh

REASON = "needs dom0 of a real Xen host with the rig's tools: make xen"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    ready = Path("/dev/xen/evtchn").exists() and shutil.which("domu")
    for item in items:
        if not ready and here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=REASON))


@pytest.fixture(scope="session")
def xen_version() -> tuple[int, ...]:
    text = dict(line.split(":", 1) for line in sh("xl info").splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in text.items()}
    return int(fields["xen_major"]), int(fields["xen_minor"])


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    """One daemon for a file's tests, as on a host; it must end well, and without complaints."""
    sh("modprobe xen-blkfront")
    daemon = Backend(tmp_path_factory.mktemp("backend"))
    daemon.start()
    yield daemon
    assert daemon.stop() == 0, daemon.log()
    errors = [line for line in daemon.log().splitlines() if "ERROR" in line]
    wanted = ("cannot open", "held until its storage is back", "another takes over")
    assert [line for line in errors if not any(words in line for words in wanted)] == []


@pytest.fixture(params=list(Slot), ids=lambda slot: slot.name.lower())
def slot(request: pytest.FixtureRequest, xen_version: tuple[int, ...]) -> Slot:
    """How xl is told that the disk is ours."""
    if request.param is Slot.TAP and xen_version < (4, 19):
        pytest.skip("xl knows no tap backends before Xen 4.19")
    chosen: Slot = request.param
    return chosen


@pytest.fixture
def best_slot(xen_version: tuple[int, ...]) -> Slot:
    """The one to take on this Xen, where a test is not about the difference."""
    return Slot.VBD if xen_version < (4, 19) else Slot.TAP


@pytest.fixture
def make_image(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str = "disk.img", size: int = 64 << 20) -> Path:
        path = tmp_path / name
        with path.open("wb") as file:
            file.truncate(size)
        return path

    return make


@pytest.fixture
def image(make_image: Callable[..., Path]) -> Path:
    return make_image()


@pytest.fixture
def attached(backend: Backend, slot: Slot, image: Path) -> Iterator[Disk]:
    """A disk of dom0's own, and nothing left of it afterwards."""
    disk = Disk(image, slot)
    disk.attach()
    yield disk
    disk.detach()


@pytest.fixture
def eventually() -> Callable[..., None]:
    def wait(condition: Callable[[], object], seconds: float = 30.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not come to hold"
            time.sleep(0.1)

    return wait


@pytest.fixture
def guests(backend: Backend, eventually: Callable[..., None]) -> Iterator[None]:
    """For tests that boot guests: when they end, no guest, node or mapping of theirs is left."""
    before = backend.held()
    yield
    listed = subprocess.run(["xl", "list"], check=False, capture_output=True, text=True).stdout
    for line in listed.splitlines()[2:]:
        subprocess.run(["xl", "destroy", line.split()[0]], check=False)
    eventually(lambda: backend_nodes() == "")
    with contextlib.suppress(AssertionError):
        eventually(lambda: no_more(backend.held(), before))
    assert no_more(backend.held(), before), (backend.held(), before)


def no_more(held: dict[str, int], before: dict[str, int]) -> bool:
    """Whether nothing is held beside what was: somebody may have been asking then."""
    return all(held[name] <= before[name] for name in before)
