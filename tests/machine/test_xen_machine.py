# SPDX-License-Identifier: Apache-2.0
"""The real machine on a box without Xen: it says what is missing, and agrees with the kernel."""

import asyncio
import os
import re
import select
import shutil
import subprocess
import tty
from pathlib import Path

import pytest

from xvd.errors import EventChannelError, GrantError, PeerClosed, XenstoreError
from xvd.machine.xen import xenstore
from xvd.machine.xen.here import available
from xvd.machine.xen.machine import XenMachine
from xvd.machine.xs.messages import Message, MessageType
from xvd.types import Domid, Port

SOURCE = Path(__file__).parents[2] / "src" / "xvd" / "machine" / "xen" / "devices.h"
UAPI = Path("/usr/include/xen")

without_xen = pytest.mark.skipif(available(), reason="this is a Xen domain")


@without_xen
def test_without_the_devices_every_call_names_the_module_to_load() -> None:
    machine = XenMachine(Domid(0))
    with pytest.raises(GrantError, match="modprobe xen-gntdev"):
        machine.grants.foreign(Domid(1))
    with pytest.raises(GrantError, match="modprobe xen-gntalloc"):
        machine.grants.share(Domid(1), 4)
    with pytest.raises(EventChannelError, match="modprobe xen-evtchn"):
        machine.event_channels.alloc_unbound(Domid(1))
    with pytest.raises(EventChannelError, match="modprobe xen-evtchn"):
        machine.event_channels.bind_interdomain(Domid(1), Port(9))
    machine.close()


@pytest.mark.parametrize("count", [0, -1, 1 << 40])
def test_a_number_of_pages_that_makes_no_sense(count: int) -> None:
    with pytest.raises(GrantError, match="at least one page"):
        XenMachine(Domid(0)).grants.share(Domid(1), count)


@without_xen
def test_without_a_xenstore_there_is_no_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xenstore, "SOCKETS", ())
    with pytest.raises(PeerClosed, match="no xenstore here"):
        asyncio.run(XenMachine.here())


def test_the_kernels_device_carries_messages_both_ways(tmp_path: Path) -> None:
    """A fifo stands for the device: what is written comes back, and a closed one is at its end."""
    os.mkfifo(tmp_path / "xenbus")

    async def main() -> None:
        device = xenstore.XenbusDevice(tmp_path / "xenbus")
        device.write(b"message")
        await device.drain()
        assert await device.read(100) == b"message"
        with pytest.raises(XenstoreError, match="E2BIG"):
            device.write(bytes(4097))
        device.close()
        device.close()
        assert await device.read(100) == b""

    asyncio.run(main())


def test_the_kernels_device_gets_one_request_at_a_time() -> None:
    """Linux forgets a request's payload when it gets the next one before it has sent the first."""
    kernel, user = os.openpty()
    tty.setraw(kernel)
    first, second = (Message(MessageType.READ, i, 0, b"path\0").pack() for i in (1, 2))
    event = Message(MessageType.WATCH_EVENT, 0, 0, b"path\0token\0").pack()

    async def main() -> None:
        device = xenstore.XenbusDevice(Path(os.ttyname(user)))
        device.write(first)
        device.write(second)
        assert os.read(kernel, 4096) == first
        for data in (event, first[:10], first[10:]):
            assert select.select([kernel], [], [], 0)[0] == []
            os.write(kernel, data)
            assert await device.read(4096) == data
        assert os.read(kernel, 4096) == second
        device.close()

    asyncio.run(main())
    os.close(kernel)
    os.close(user)


NAMES = {
    "XVD_GNTDEV_MAP": "IOCTL_GNTDEV_MAP_GRANT_REF",
    "XVD_GNTDEV_UNMAP": "IOCTL_GNTDEV_UNMAP_GRANT_REF",
    "XVD_GNTDEV_COPY": "IOCTL_GNTDEV_GRANT_COPY",
    "XVD_GNTALLOC_ALLOC": "IOCTL_GNTALLOC_ALLOC_GREF",
    "XVD_GNTALLOC_DEALLOC": "IOCTL_GNTALLOC_DEALLOC_GREF",
    "XVD_EVTCHN_BIND_INTERDOMAIN": "IOCTL_EVTCHN_BIND_INTERDOMAIN",
    "XVD_EVTCHN_BIND_UNBOUND": "IOCTL_EVTCHN_BIND_UNBOUND_PORT",
    "XVD_EVTCHN_NOTIFY": "IOCTL_EVTCHN_NOTIFY",
    "XVD_EVTCHN_RESTRICT": "IOCTL_EVTCHN_RESTRICT_DOMID",
    "offsetof(struct xvd_map_grants, refs)": "offsetof(struct ioctl_gntdev_map_grant_ref, refs)",
    "offsetof(struct xvd_copy_segment, flags)":
        "offsetof(struct gntdev_grant_copy_segment, flags)",
    "offsetof(struct xvd_copy_segment, status)":
        "offsetof(struct gntdev_grant_copy_segment, status)",
    "offsetof(struct xvd_alloc_grants, grefs)":
        "offsetof(struct ioctl_gntalloc_alloc_gref, gref_ids)",
}  # fmt: skip


def test_the_numbers_are_the_kernels(tmp_path: Path) -> None:
    gcc = shutil.which("gcc")
    if gcc is None or not all((UAPI / f"{n}.h").exists() for n in ("gntdev", "gntalloc", "evtchn")):
        pytest.skip("gcc or the kernel's headers are missing: install gcc and linux-libc-dev")
    assert set(re.findall(r"#define (XVD_(?:GNT|EVT)\w+) _IOC", SOURCE.read_text())) <= set(NAMES)
    asserts = "".join(
        f'_Static_assert({ours} == {theirs}, "");\n' for ours, theirs in NAMES.items()
    )
    (tmp_path / "check.c").write_text(
        "#include <stddef.h>\n#include <stdint.h>\n#include <linux/types.h>\n"
        "typedef uint32_t grant_ref_t;\ntypedef uint16_t domid_t;\n"
        "#include <xen/gntdev.h>\n#include <xen/gntalloc.h>\n#include <xen/evtchn.h>\n"
        f'#include "{SOURCE}"\n{asserts}'
    )
    subprocess.run([gcc, "-c", "-o", tmp_path / "check.o", tmp_path / "check.c"], check=True)
