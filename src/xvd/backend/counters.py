# SPDX-License-Identifier: Apache-2.0
"""Counters by name, and adding them: over the queues of a disk, and over its connections."""

from typing import Any, Final

NOW: Final = ("in_flight", "persistent_grants", "buffer_pages")
"""The counters of a moment: they are empty again when a connection has ended."""


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
    """Return the counters of a connection that has ended."""
    return counters | dict.fromkeys(NOW, 0)
