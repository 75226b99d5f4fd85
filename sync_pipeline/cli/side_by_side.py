"""A conflict as a person decides it: both rows side by side, the fields that differ marked."""

import json
from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from sync_pipeline.cli import show
from sync_pipeline.config import Config
from sync_pipeline.records import printable
from sync_pipeline.views import Conflict

MARK = "*"
_MISSING = object()


def render(link: Config, conflict: Conflict) -> RenderableType:
    """Lay one conflict out: what it is in a line, then a row for each field with what each node had."""
    decided = f"{conflict.winner} won" if conflict.winner else "held until you decide"
    title = (
        f"{conflict.id} on {conflict.node}: {conflict.table_name} {conflict.record_id}, {conflict.kind}, {decided}, "
        f"detected {show.moment(conflict.detected_at)}"
    )
    here, there = conflict.node, link.other(conflict.node).name
    rows = {here: conflict.local_row, there: conflict.remote_row}
    names = [node.name for node in link.nodes]
    headings = ("", "field", *(name if rows[name] else f"{name} (deleted)" for name in names))
    return Group(
        Text(printable(title), style="bold"),
        show.table(None, headings, _fields(*(rows[name] for name in names))),
    )


def _fields(
    first: Mapping[str, Any] | None, second: Mapping[str, Any] | None
) -> list[tuple[object, ...]]:
    fields = dict.fromkeys([*(first or {}), *(second or {})])
    values = [
        (name, (first or {}).get(name, _MISSING), (second or {}).get(name, _MISSING))
        for name in fields
    ]
    return [
        (MARK if one != two else "", name, _shown(one), _shown(two)) for name, one, two in values
    ]


def _shown(value: object) -> str:
    """Return a value so that NULL, an empty text and a field that is not there can be told apart."""
    if value is _MISSING:
        return "-"
    if value is None:
        return "NULL"
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
