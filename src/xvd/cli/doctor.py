# SPDX-License-Identifier: Apache-2.0
"""``xvd doctor``: what this machine can do, and what stands in the way."""

import contextlib
import mmap
import os
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from xvd.backend.budget import REMEDIES, Claim
from xvd.backend.limits import XEN_MAPTRACK, capacity, limits_of_host
from xvd.backend.rival import rival
from xvd.backend.settings import Settings as BackendSettings
from xvd.blkif.abi import Abi
from xvd.blkif.nodes import FrontendConfig, QueueConfig, format_frontend
from xvd.cli import common, output
from xvd.engines.file import probe_io_uring
from xvd.errors import ConfigError, describe
from xvd.frontend.settings import Settings as FrontSettings
from xvd.machine.emulated.limits import Limits
from xvd.machine.xen import xenstore
from xvd.machine.xen.here import available
from xvd.packages import find_tool, package_of
from xvd.service.sandbox.confine import check as check_confinement
from xvd.types import PAGE_SIZE, Gref, Port

NODES_QUOTA: Final = 1000
"""Nodes that xenstored lets an unprivileged domain have."""
FRONT_NODES: Final = 9
"""Of a disk's frontend directory besides what the frontend writes: itself, and the toolstack's."""
GRANTS_V1: Final = 32768
"""Of a domain: 64 frames of 512 entries."""
GNTALLOC_LIMIT: Final = Path("/sys/module/xen_gntalloc/parameters/limit")


@dataclass(frozen=True, slots=True)
class Finding:
    """One check. needed: what fails without it; remedy: empty if all is well."""

    what: str
    ok: bool
    needed: str
    detail: str = ""
    remedy: str = ""


def _io_uring() -> Finding:
    problem = probe_io_uring()
    remedy = "allow it: sysctl kernel.io_uring_disabled=0, and no seccomp filter against it"
    return Finding("io_uring", not problem, "everything", problem, remedy if problem else "")


def _confinement() -> Finding:
    try:
        check_confinement()
    except ConfigError as error:
        problem, _, remedy = str(error).partition(": ")
        return Finding(
            "a fence around guests", False, "xvd backend --isolation guest", problem, remedy
        )
    return Finding("a fence around guests", True, "xvd backend --isolation guest")


def _memfd() -> Finding:
    try:
        os.close(os.memfd_create("xvd-doctor"))
    except OSError as error:
        return Finding(
            "memfd", False, "the emulated machine", describe(error), "use Linux 3.17 or later"
        )
    return Finding("memfd", True, "the emulated machine")


def _maps() -> Finding:
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    ok = limit >= 65530
    return Finding(
        "memory mappings", ok, "many disks with mapped grants", f"vm.max_map_count is {limit}",
        "" if ok else "sysctl vm.max_map_count=262144",
    )  # fmt: skip


def _descriptors() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    ok = soft >= 1024
    return Finding(
        "open files", ok, "about eight for each disk", f"the limit is {soft}",
        "" if ok else "ulimit -n 4096",
    )  # fmt: skip


def _tool(name: str, needed: str) -> Callable[[], Finding]:
    def check() -> Finding:
        found = find_tool(name)
        remedy = "" if found else f"apt-get install {package_of(name)}"
        return Finding(name, bool(found), needed, found or "not found", remedy)

    return check


def _device(path: str, needed: str, remedy: str) -> Callable[[], Finding]:
    def check() -> Finding:
        ok = os.access(path, os.R_OK | os.W_OK)
        there = Path(path).exists()
        detail = "" if ok else ("no permission" if there else "not there")
        return Finding(path, ok, needed, detail, "" if ok else remedy)

    return check


def _free(kind: str, without: str) -> Callable[[], Finding]:
    """Whether nobody else serves a kind of backend on this Xen host."""

    def check() -> Finding:
        other = rival(kind)
        what, _, remedy = other.partition("; ")
        detail = f"served by {what}" if other else ""
        return Finding(f"backend/{kind}", not other, without, detail, remedy)

    return check


def _xenstore() -> Finding:
    ways = [path for path in (*xenstore.SOCKETS, *xenstore.DEVICES) if path.exists()]
    remedy = "" if ways else "only on a Xen domain: start xenstored, or modprobe xenfs"
    return Finding("xenstore", bool(ways), "real Xen", str(ways[0]) if ways else "", remedy)


def _room(xen: bool) -> tuple[str, dict[str, int]]:
    """(what limits the number of disks, how many each resource is enough for)."""
    settings = BackendSettings()
    claim = Claim(
        queues=settings.queues_offered,
        ring_pages=1 << settings.max_ring_page_order,
        segments=settings.indirect_segments_offered,
        persistent=True,
        kept=settings.max_persistent_grants,
        copying=False,
        buffer_pages=settings.max_buffer_pages,
    )
    limits = limits_of_host(XEN_MAPTRACK if xen else Limits().tracks)
    disks = capacity(claim, limits)
    return min(disks, key=lambda name: disks[name]), disks


def _guest_room() -> dict[str, int]:
    """How many disks a frontend's domain has room for: nodes of its store, grants of gntalloc."""
    front, back = FrontSettings(), BackendSettings()
    queues = min(front.max_queues, back.queues_offered)
    pages = 1 << min(front.max_ring_page_order, back.max_ring_page_order)
    config = FrontendConfig(
        Abi.native(), (QueueConfig((Gref(8),) * pages, Port(1)),) * queues, persistent=True
    )
    nodes = len(format_frontend(config, ()).write) + queues * (queues > 1) + FRONT_NODES
    grants = queues * (pages + front.pool_pages)
    room = {"xenstore nodes": NODES_QUOTA // nodes, "grants": GRANTS_V1 // grants}
    with contextlib.suppress(OSError, ValueError):
        room["gntalloc pages"] = int(GNTALLOC_LIMIT.read_text()) // grants
    return room


def _disks(xen: bool) -> Callable[[], Finding]:
    """Whether there is room for a disk with everything, and for how many."""

    def check() -> Finding:
        least, disks = _room(xen)
        detail = f"room for {disks[least]} of the default features; {least} end first"
        return Finding(
            "backend's disks", disks[least] > 0, "disks that need not do with less", detail,
            "" if disks[least] else REMEDIES[least],
        )  # fmt: skip

    return check


def _guests_disks() -> Finding:
    room = _guest_room()
    least = min(room, key=lambda name: room[name])
    detail = f"room for {room[least]} of the default features in a guest; {least} end first"
    return Finding("frontend's disks", room[least] > 0, "disks of one guest", detail)


def page_size() -> Finding:
    """Tell what the size of this kernel's pages costs: each page that is granted takes one."""
    needed, size = "pages that are granted", mmap.PAGESIZE
    if size == PAGE_SIZE:
        return Finding("page size", True, needed, "4 KiB, as Xen's")
    front = FrontSettings()
    pages = front.max_queues * (front.pool_pages + (1 << front.max_ring_page_order))
    detail = (
        f"{size >> 10} KiB, each for 4 KiB of a disk: a frontend takes {pages * size >> 20} MiB of "
        f"memory for one of the default features, a backend as much address space"
    )
    remedy = "where that is too much, set pool_pages, max_queues and max_ring_page_order lower"
    return Finding("page size", True, needed, detail, remedy)


_ESSENTIAL: tuple[Callable[[], Finding], ...] = (_io_uring, _memfd, _maps, _descriptors)
_OPTIONAL: tuple[Callable[[], Finding], ...] = (
    _tool("qemu-img", "converting and comparing images"),
    _tool("nbdinfo", "looking at an export"),
    _tool("nbdfuse", "mounting an export where there is no kernel nbd"),
    _tool("fio", "the bench's peer figures"),
    _device("/dev/fuse", "nbdfuse", "modprobe fuse"),
    _device("/dev/xen/evtchn", "real Xen", "only on a Xen domain: modprobe xen-evtchn"),
    _device(
        "/dev/xen/gntdev", "a backend on real Xen", "only on a Xen domain: modprobe xen-gntdev"
    ),
    _device(
        "/dev/xen/gntalloc", "a frontend on real Xen", "only on a Xen domain: modprobe xen-gntalloc"
    ),
    _xenstore,
    _confinement,
    page_size,
)
_ON_XEN: tuple[Callable[[], Finding], ...] = (
    _free("vbd", "disks of phy and of driver domains"),
    _free("vbd3", "disks of backendtype=tap, from Xen 4.19 on"),
)


def doctor(json: common.Json = False) -> int:
    """Check what this machine can do. Fails if the emulated machine cannot run on it."""
    essential = [check() for check in _ESSENTIAL]
    xen = available()
    optional = [
        check() for check in (*_OPTIONAL, _disks(xen), _guests_disks, *(_ON_XEN if xen else ()))
    ]
    fit = all(finding.ok for finding in essential)
    if json:
        rows = [
            {"what": f.what, "ok": f.ok, "needed_for": f.needed, "detail": f.detail,
             "remedy": f.remedy, "essential": f in essential}
            for f in essential + optional
        ]  # fmt: skip
        least, disks = _room(xen)
        room = {"limited_by": least, "backend": disks, "frontend": _guest_room()}
        output.print_json({"fit": fit, "checks": rows, "disks": room})
        return 0 if fit else 1
    for finding in essential + optional:
        mark = "ok     " if finding.ok else ("MISSING" if finding in essential else "absent ")
        text = f"{mark} {finding.what:<18} for {finding.needed}"
        if finding.detail:
            text += f" ({finding.detail})"
        if finding.remedy:
            text += f"; {finding.remedy}"
        output.tell(text + "\n")
    return 0 if fit else 1
