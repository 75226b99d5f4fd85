"""The end of the demo: the comparison of both sides, and the plain SQL of an operator, run and shown."""

from dataclasses import dataclass
from typing import Any, LiteralString

from sync_pipeline.database import connected
from sync_pipeline.demo.stage import Stage
from sync_pipeline.verify import VerifyReport, verify

_TYPED: tuple[tuple[str, LiteralString], ...] = (
    (
        "send one record again",
        (
            "insert into sync.sync_events (table_name, record_id, event_type)\n"
            "values ('users', '10', 'update');"
        ),
    ),
    (
        "how much waits, and for how long",
        "select pending, oldest_seconds::int, retrying, dead, conflicts_24h from sync.sync_status;",
    ),
    (
        "what waits",
        "select id, table_name, record_id, event_type from sync.sync_events order by id limit 5;",
    ),
    (
        "drop a stuck event",
        "delete from sync.sync_events where table_name = 'users' and record_id = '10';",
    ),
    (
        "try again now what was refused",
        "update sync.sync_failures set next_attempt_at = now() where table_name = 'orders';",
    ),
)


@dataclass(frozen=True, slots=True)
class Statement:
    """A statement that was run, why, and what it returned."""

    purpose: str
    sql: str
    result: str


def compare(stage: Stage) -> VerifyReport:
    """Compare every record of both sides."""
    link = stage.shop.config
    with (
        connected(link.first, link, "verify") as first,
        connected(link.second, link, "verify") as second,
    ):
        report = verify(link, {link.first.name: first, link.second.name: second})
    for name, table in report.tables.items():
        rows = ", ".join(f"{node} {count}" for node, count in table.rows.items())
        stage.say(f"{name:<9} {'equal' if table.equal else 'DIFFERENT'}: {rows} rows")
    return report


def operate(stage: Stage) -> list[Statement]:
    """Run what an operator would type into psql on crm, with no consumer around; it leaves nothing behind."""
    statements = []
    for purpose, typed in _TYPED:
        statement = Statement(purpose, typed, _result(stage, typed))
        statements.append(statement)
        stage.say(f"-- {purpose}")
        for text in statement.sql.splitlines():
            stage.say(f"  {text}")
        stage.say(f"  => {statement.result}")
    return statements


def _result(stage: Stage, typed: LiteralString) -> str:
    cursor = stage.shop.crm.connection.execute(typed)
    if cursor.description is None:
        return cursor.statusmessage or ""
    names = [column.name for column in cursor.description]
    return "; ".join(_row(names, row) for row in cursor) or "no rows"


def _row(names: list[str], values: tuple[Any, ...]) -> str:
    return ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True))
