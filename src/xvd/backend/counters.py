# SPDX-License-Identifier: Apache-2.0
"""Counters by name, and adding them: over the queues of a disk, and over its connections."""

from typing import Any, Final

NOW: Final = ("in_flight", "persistent_grants", "buffer_pages")
"""What is true of one moment: nothing of it is left when a connection is over."""


def merge_counters(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Add counters by name: refusals by reason, histograms count by count."""
    merged = dict(a)
    for name, value in b.items():
        if isinstance(value, dict):
            merged[name] = merge_counters(merged.get(name, {}), value)
        elif isinstance(value, list):
            before = merged.get(name, [0] * len(value))
            merged[name] = [one + other for one, other in zip(before, value, strict=True)]
        else:
            merged[name] = merged.get(name, 0) + value
    return merged


def without_now(counters: dict[str, Any]) -> dict[str, Any]:
    """The same when the connection is over."""
    return counters | dict.fromkeys(NOW, 0)
