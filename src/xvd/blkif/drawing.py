# SPDX-License-Identifier: Apache-2.0
"""The handshake's tables for people: as Markdown, and as a graph for Graphviz."""

from collections.abc import Mapping
from typing import Any, Final

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


_ASIDE: Final = frozenset({"REMOVE", "REMOVE_ALONE"})
"""Events that nearly every state knows: words in the state instead of an arrow."""

_STYLE: Final = """\
    rankdir=TB; nodesep=0.2; ranksep=0.35; bgcolor=white;
    node [shape=box, style="rounded,filled", fillcolor="#eceff1", color="#455a64", height=0.3,
          margin="0.1,0.04", fontname="sans-serif", fontsize=12];
    edge [color="#607d8b", fontcolor="#263238", fontname="sans-serif", fontsize=9, arrowsize=0.6];
"""


def render_diagram(table: Mapping[Any, Step[Any, Any]]) -> str:
    """`BACKEND` or `FRONTEND` as a graph for Graphviz's ``dot``, without rows that stay in their
    state, and without what leads from any state to the same."""
    arrows: dict[tuple[str, str], list[str]] = {}
    aside: dict[str, list[str]] = {}
    states: dict[str, None] = {}
    for state, events, step in _rows(table):
        here, there = state.name, step.state.name
        if here == there:
            continue
        states |= {here: None, there: None}
        seen = [event for event in events if event not in _ASIDE]
        if seen:
            arrows.setdefault((here, there), []).extend(seen)
        if rest := [event for event in events if event in _ASIDE]:
            aside.setdefault(here, []).append(f"{' / '.join(rest)} &#8594; {there}")
    lines = ["digraph {", _STYLE.rstrip()]
    for name in states:
        words = "".join(
            f'<BR/><FONT POINT-SIZE="9" COLOR="#455a64">{text}</FONT>'
            for text in aside.get(name, ())
        )
        lines.append(f"    {name} [label=<<B>{name}</B>{words}>];")
    for (here, there), events in arrows.items():
        label = "\\n".join(events)
        lines.append(f'    {here} -> {there} [label="{label}"];')
    return "\n".join([*lines, "}"]) + "\n"
