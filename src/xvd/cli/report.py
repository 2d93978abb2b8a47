# SPDX-License-Identifier: Apache-2.0
"""Figures of a disk for people: a short account, and the dict behind it."""

from typing import TYPE_CHECKING, Any

from xvd.backend.counters import BackCounters
from xvd.backend.device import Device
from xvd.engines.interface import describe
from xvd.types import RING_SECTOR_SIZE

if TYPE_CHECKING:
    from xvd.frontend.disk import Disk


def disk_figures(device: Device, disk: "Disk | None" = None) -> dict[str, Any]:
    """Return everything known of a disk: what it is, what was negotiated, what was counted."""
    features, connection = device.disk.features, device.disk.connection
    figures: dict[str, Any] = {
        "disk": device.name,
        "path": device.path,
        "state": device.state.name,
        "image": device.assignment.image if device.assignment else "",
        "paused": device.disk.paused,
        "held": device.hold.why,
        "swapped_to": device.life.swapped_to,
        "limits": device.disk.limits.figures(),
        "group": device.disk.settings.group_name,
        "counters": device.disk.counters().figures(),
    }
    if features is not None:
        figures["sectors"] = features.sectors
        figures["flush"] = features.flush
        figures["discard"] = features.discard
    if connection is not None:
        figures["protocol"] = connection.config.abi.protocol
        figures["ring_pages"] = connection.config.ring_pages
        figures["queues"] = len(connection.config.queues)
        figures["queue_counters"] = [link.queue.counters() for link in connection.links]
        figures["persistent_negotiated"] = connection.plan.persistent
        figures["loop"] = connection.loop_counters().figures()
        figures["mode"] = device.disk.mode
    if disk is not None:
        figures |= disk.statistics().figures()
    return figures


def disk_info(device: Device) -> dict[str, Any]:
    """Return what a disk's storage is, and what is done with it."""
    disk, engine = device.disk, device.disk.engine
    storage = {} if engine is None else describe(engine)
    storage.pop("engine", None)  # that of the layer which checks
    return {
        "disk": device.name,
        "state": device.state.name,
        "image": device.assignment.image if device.assignment else "",
        "identity": "" if engine is None else engine.identity,
        "trouble": "" if engine is None else engine.trouble,
        "paused": disk.paused,
        "held": device.hold.why,
        "storage": storage,
        "copy": device.copies.figures(),
        "backups": device.tracking.names,
    }


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return ""


def account(figures: dict[str, Any], seconds: float) -> str:
    """Tell what happened on one disk, in a few lines."""
    back = BackCounters.of(figures["counters"])
    from xvd.frontend.statistics import FrontCounters  # a backend has no use for it

    front = FrontCounters.of(figures.get("frontend", {}))
    sent = back.notified + front.notified
    # One for each request and each response would be needed if nobody held any back.
    saved = back.requests + back.responses - sent
    refused = sum(back.refusals.values())
    handled = f"{back.mapped} mapped and {back.unmapped} unmapped"
    if figures.get("mode") == "persistent grants":
        handled += f"; {back.persistent_hits} found mapped"
    if figures.get("mode") == "grant copy":
        handled = f"{back.copied} copied"
    return "\n".join(
        (
            f"disk           {figures['image']}, {_size(figures['sectors'] * RING_SECTOR_SIZE)}",
            f"negotiated     {figures['protocol']}, {figures['queues']} queue, "
            f"{figures['ring_pages']} ring page, {figures['mode']}, "
            f"flush {_yes(figures['flush'])}, discard {_yes(figures['discard'])}",
            f"requests       {back.requests}: {back.rd_req} reads, {back.wr_req} writes, "
            f"{back.f_req} flushes, {back.ds_req} discards; {refused} refused, "
            f"{back.errors} failed",
            f"data           {_size(back.rd_sect * RING_SECTOR_SIZE)} read, "
            f"{_size(back.wr_sect * RING_SECTOR_SIZE)} written",
            f"grants         {handled}",
            f"notifications  {sent} sent, {saved} saved by batching and hold-off",
            f"time           {seconds:.1f} s",
            "",
        )
    )


def _yes(value: bool) -> str:
    return "yes" if value else "no"
