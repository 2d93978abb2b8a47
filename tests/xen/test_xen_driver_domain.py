# SPDX-License-Identifier: Apache-2.0
"""`xvd backend` in a driver domain serves another guest; libxl runs nothing there for it."""

import subprocess
from collections.abc import Callable, Iterator

import pytest
from xen_host import COMPLAINTS, VERIFY, Backend, Slot, domu, sh, typed


@pytest.fixture
def storage(
    backend: Backend, best_slot: Slot, guests: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """A driver domain whose own root comes from dom0's backend, with a daemon inside."""
    monkeypatch.setenv("DOMU_SLOT", best_slot.value)
    sh("domu -n storage -m 400 -b -r -x driver_domain=1")
    typed("storage", "modprobe -r xen-blkback 2> /dev/null; truncate -s 64M /tmp/x.img")
    typed("storage", "(xvd backend -vv > /tmp/out 2> /tmp/log &)")
    typed(
        "storage",
        "n=0; until grep -q ready /tmp/out || [ $n -gt 600 ]; do sleep .1; n=$((n+1)); done",
    )
    assert typed("storage", "cat /tmp/out").strip() == "ready", typed("storage", "cat /tmp/log")
    yield "storage"
    assert "ERROR" not in typed("storage", "cat /tmp/log")


def nodes(domain: str) -> str:
    """The disks that a domain is to serve, or serves."""
    domid = sh(f"xl domid {domain}").strip()
    return sh(f"xenstore-ls -f /local/domain/{domid}/backend | grep state || true")


def test_a_guest_verifies_a_disk_of_a_driver_domain(
    slot: Slot, storage: str, eventually: Callable[..., None]
) -> None:
    kind = "phy" if slot is Slot.VBD else "tap"
    line = f"format=raw,vdev=xvda,access=rw,backend={storage},backendtype={kind},target=/tmp/x.img"
    domu("-n", "u1", "-d", line, f"{VERIFY} && ! {COMPLAINTS}")
    eventually(lambda: nodes(storage) == "")


def test_a_disk_of_a_driver_domain_is_attached_and_detached(storage: str) -> None:
    line = f"format=raw,vdev=xvda,access=rw,backend={storage},backendtype=phy,target=/tmp/x.img"
    sh("domu -n u1 -m 200 -b")
    for _ in range(3):
        sh(f"xl block-attach u1 '{line}'")
        typed("u1", "n=0; until [ -b /dev/xvda ] || [ $n -gt 100 ]; do sleep .1; n=$((n+1)); done")
        typed("u1", "dd if=/dev/xvda of=/dev/null bs=4k count=16 iflag=direct 2>&1")
        done = subprocess.run(
            ["xl", "block-detach", "u1", "xvda"], check=False, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert nodes(storage) == ""
