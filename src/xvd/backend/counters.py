# SPDX-License-Identifier: Apache-2.0
"""Counters by name, and adding them: over the queues of a disk, and over its connections."""


def merge_counters(a: dict[str, object], b: dict[str, object]) -> dict[str, object]:
    """Add counters by name, the refusals by reason."""
    merged = dict(a)
    for name, value in b.items():
        if isinstance(value, dict):
            merged[name] = merge_counters(merged.get(name, {}), value)  # type: ignore[arg-type]
        else:
            merged[name] = merged.get(name, 0) + value  # type: ignore[operator]
    return merged
