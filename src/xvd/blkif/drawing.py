# SPDX-License-Identifier: Apache-2.0
"""The handshake's tables for people: as Markdown, and as a diagram."""

from collections.abc import Mapping
from typing import Any

from xvd.blkif.handshake import BackendState, FrontendState, Step

__all__ = ["render_diagram", "render_table"]


def _label(state: BackendState | FrontendState) -> str:
    node = "" if state.xenbus is None else f" ({state.xenbus.value})"
    return f"{state.name}{node}"


def _from_anywhere(table: Mapping[Any, Step[Any, Any]]) -> dict[Any, Step[Any, Any]]:
    """The events that lead every state to the same step."""
    states = {state for state, _ in table}
    by_event: dict[Any, dict[Any, Step[Any, Any]]] = {}
    for (state, event), step in table.items():
        by_event.setdefault(event, {})[state] = step
    return {
        event: next(iter(steps.values()))
        for event, steps in by_event.items()
        if len(steps) == len(states) and len(set(steps.values())) == 1
    }


def _rows(table: Mapping[Any, Step[Any, Any]]) -> list[tuple[Any, list[str], Step[Any, Any]]]:
    """The table by state, with the events that lead a state to the same step put together.

    Without what leads everywhere to the same.
    """
    anywhere = _from_anywhere(table)
    rows: dict[tuple[Any, Step[Any, Any]], list[str]] = {}
    for (state, event), step in table.items():
        if event not in anywhere:
            rows.setdefault((state, step), []).append(event.name)
    ordered = sorted(rows.items(), key=lambda row: int(row[0][0].value[0]))
    return [(state, events, step) for (state, step), events in ordered]


def render_table(table: Mapping[Any, Step[Any, Any]]) -> str:
    """`BACKEND` or `FRONTEND` as a Markdown table; in brackets what the state node then says."""
    lines = ["| state | event | next | actions |", "|---|---|---|---|"]
    for state, events, step in _rows(table):
        actions = ", ".join(action.name for action in step.actions)
        after = "" if step.state is state else _label(step.state)
        lines.append(f"| {_label(state)} | {', '.join(events)} | {after} | {actions} |")
    for event, step in _from_anywhere(table).items():
        lines.append(f"| any | {event.name} | {_label(step.state)} | |")
    return "\n".join(lines) + "\n"


def render_diagram(table: Mapping[Any, Step[Any, Any]]) -> str:
    """`BACKEND` or `FRONTEND` as a Mermaid state diagram, without rows that stay in their state,
    and without what leads from any state to the same."""
    lines = ["stateDiagram-v2"]
    for state, events, step in _rows(table):
        if step.state is not state:
            lines.append(f"    {state.name} --> {step.state.name}: {' / '.join(events)}")
    return "\n".join(lines) + "\n"
