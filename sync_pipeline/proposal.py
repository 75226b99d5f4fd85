"""A first `sync.yaml`, from what both databases have: tables in common, what differs, what is left out and why.

Nothing is changed. What is proposed passes `install`; what could not is written beside it as a comment.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from psycopg.rows import dict_row

from sync_pipeline import catalog, queries
from sync_pipeline.config import Config, NodeConfig, SideConfig, TableConfig
from sync_pipeline.database import Connection, query
from sync_pipeline.errors import SyncPipelineError
from sync_pipeline.records import Relation

# A name that YAML and `sync.yaml` take as it is: no quotes, no dot but the one between schema and table.
_PLAIN = re.compile(r"[a-z_][a-z0-9_]*(\.[a-z_][a-z0-9_]*)?")
_YAML_WORDS = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}
# Where tools that change schemas note what they have done to this database: Rails, Django, Prisma, Flyway, Liquibase,
# Alembic, Knex, Sequelize, Doctrine, Phinx, Laravel and TypeORM, Drizzle, Entity Framework, goose, node-pg-migrate,
# MikroORM, Hasura, sqlx, Diesel, refinery.
_MIGRATIONS = {
    "schema_migrations", "ar_internal_metadata", "django_migrations", "_prisma_migrations",
    "flyway_schema_history", "schema_version", "databasechangelog", "databasechangeloglock",
    "alembic_version", "knex_migrations", "knex_migrations_lock", "sequelizemeta",
    "doctrine_migration_versions", "phinxlog", "migrations", "__drizzle_migrations",
    "__efmigrationshistory", "goose_db_version", "pgmigrations", "mikro_orm_migrations",
    "_sqlx_migrations", "__diesel_schema_migrations", "refinery_schema_history",
}  # fmt: skip
# Where workers and schedulers of one database share out their work: Solid Queue, GoodJob, Delayed Job, Que, Queue
# Classic; Oban; Procrastinate, Django Q, PgQueuer, APScheduler, Kombu; River; Quartz, ShedLock, JobRunr; Messenger,
# Laravel; by their schemas Graphile Worker, pg-boss, Hangfire.
_WORK = re.compile(
    r"solid_queue_\w+|good_jobs?|good_job_\w+|delayed_jobs|que_(jobs|lockers|values)|queue_classic_jobs"
    r"|oban_(jobs|peers|producers)|procrastinate_\w+|django_q_\w+|pgqueuer(_\w+)?|apscheduler_jobs|kombu_\w+"
    r"|river_(job|leader|queue|client|client_queue)|qrtz_\w+|shedlock|jobrunr_\w+|messenger_messages"
    r"|job_batches|failed_jobs|cache_locks",
    re.IGNORECASE,
)
_WORK_SCHEMAS = {"graphile_worker", "pgboss", "hangfire"}


@dataclass(frozen=True, slots=True)
class Found:
    """A table of one node. `parents` are the tables it refers to, with their schemas.

    `key` are unique columns, none of them null, of a table without a primary key, as tables that join two others have;
    `joined` are those of one that has a generated primary key besides, which nothing refers to.
    """

    schema_name: str
    table_name: str
    visible: bool
    key: list[str]
    joined: list[str]
    parents: list[str]


@dataclass(frozen=True, slots=True)
class Proposal:
    """What to sync, parents first, each table with remarks; and what not, with the reason."""

    tables: dict[str, list[str]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    text: str = ""


def propose(
    nodes: tuple[NodeConfig, NodeConfig],
    connections: Mapping[str, Connection],
    variables: Mapping[str, str],
) -> Proposal:
    """Inspect both databases and propose a configuration; `variables` name each node's variable with the DSN.

    Raises when there is no table that both have and that can be synced.
    """
    found = {node.name: _tables(connections[node.name]) for node in nodes}
    pairs, left_out = _pairs(nodes, found)
    for name in [name for name in pairs if name.rpartition(".")[2].lower() in _MIGRATIONS]:
        left_out[name] = (
            "each node notes here which migrations it has run; synced, the other one would not run them"
        )
        del pairs[name]
    for name in [name for name, both in pairs.items() if any(map(_is_work, both.values()))]:
        left_out[name] = (
            "a queue or locks of workers; synced, those of both nodes would do the same work twice"
        )
        del pairs[name]
    if not pairs:
        raise SyncPipelineError(
            "the two databases have no table in common",
            remedy="check both DSNs, or create the tables of one on the other: pg_dump --schema-only | psql",
        )
    config = Config(nodes=nodes, tables=tuple(_config(name, both) for name, both in pairs.items()))
    read, problems = catalog.inspect(config, connections, strict=False)
    for problem in problems:
        where = f"{problem.node}: " if problem.node else ""
        left_out[problem.table or ""] = f"{where}{problem.problem}; {problem.remedy}"
    if not read.tables:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise SyncPipelineError(f"no table can be synced: {reasons}")
    synced = {
        node.name: {f"{each.schema}.{each.name}" for each in read.relations[node.name].values()}
        for node in nodes
    }
    remarks = {}
    entries = []
    for name in read.tables:
        relations = {node.name: read.relation(node.name, name) for node in nodes}
        unsynced = {
            parent
            for node, table in pairs[name].items()
            for parent in table.parents
            if parent not in synced[node]
        }
        remarks[name] = _remarks(pairs[name], relations, sorted(unsynced))
        entries.append(_entry(name, pairs[name], relations, remarks[name]))
    head = _head(nodes, variables)
    return Proposal(remarks, left_out, head + "".join(entries) + _tail(left_out))


def _tables(connection: Connection) -> list[Found]:
    with connection.cursor(row_factory=dict_row) as cursor:
        rows = cursor.execute(query(queries.get("list_tables", "sync"))).fetchall()
    return [Found(**row) for row in rows]


def _pairs(
    nodes: tuple[NodeConfig, NodeConfig], found: dict[str, list[Found]]
) -> tuple[dict[str, dict[str, Found]], dict[str, str]]:
    """Match the tables of both nodes: by schema and name, then by a name that each has only once."""
    first, second = (node.name for node in nodes)
    pairs: dict[str, dict[str, Found]] = {}
    left_out: dict[str, str] = {}
    rest: dict[str, list[Found]] = {first: [], second: []}
    names = {
        node: {(each.schema_name, each.table_name): each for each in tables}
        for node, tables in found.items()
    }
    for node, other in ((first, second), (second, first)):
        rest[node] = [each for key, each in names[node].items() if key not in names[other]]
    for key, mine in names[first].items():
        if key in names[second]:
            theirs = names[second][key]
            # The short name, where the search path of both leads to it. A dot inside of a name is none of ours.
            short = mine.visible and theirs.visible
            name = ".".join(part.replace(".", "_") for part in (key[1:] if short else key))
            while name in pairs:
                name += "_"
            pairs[name] = {first: mine, second: theirs}
    for mine in rest[first]:
        same = [each for each in rest[second] if each.table_name == mine.table_name]
        twins = [each for each in rest[first] if each.table_name == mine.table_name]
        name = mine.table_name.replace(".", "_")
        if len(same) == len(twins) == 1 and name not in pairs:
            pairs[name] = {first: mine, second: same[0]}
    taken = {node: {id(both[node]) for both in pairs.values()} for node in (first, second)}
    for node in (first, second):
        for each in rest[node]:
            if id(each) not in taken[node]:
                left_out[f"{each.schema_name}.{each.table_name}"] = f"only {node} has it"
    return pairs, left_out


def _is_work(table: Found) -> bool:
    return bool(_WORK.fullmatch(table.table_name)) or table.schema_name.lower() in _WORK_SCHEMAS


def _config(name: str, both: dict[str, Found]) -> TableConfig:
    sides = {
        node: SideConfig(table=(table.schema_name, table.table_name))
        for node, table in both.items()
    }
    return TableConfig(name=name, sides=sides, key=_key(both))


def _key(both: dict[str, Found]) -> tuple[str, ...] | None:
    """Return the columns to name as the key: neither node has a primary key, and both have the same unique columns."""
    one, two = both.values()
    return tuple(one.key) if one.key and sorted(one.key) == sorted(two.key) else None


def _remarks(
    both: dict[str, Found], relations: dict[str, Relation], unsynced: list[str]
) -> list[str]:
    remarks = []
    one, two = relations.values()
    if one.key_is_deferrable or two.key_is_deferrable:
        remarks.append("the constraint of the key is deferrable: errors are found later")
    for field_name in one.columns:
        mine, theirs = one.columns[field_name], two.columns[field_name]
        if mine.formatted_type != theirs.formatted_type:
            remarks.append(
                f"{field_name} is {mine.formatted_type} on {one.node}, "
                f"{theirs.formatted_type} on {two.node}"
            )
    here, there = both.values()
    if here.joined and sorted(here.joined) == sorted(there.joined):
        columns, own = ", ".join(here.joined), ", ".join(one.key)
        remarks.append(
            f"rows that both nodes add for the same {columns} are refused; unless {own} must be equal on both, "
            f"`key: {_flow(here.joined)}` and `exclude: {_flow(one.key)}` make them one record"
        )
    remarks += [f"refers to {parent}, which is not synced" for parent in unsynced]
    return remarks


def _entry(
    name: str, both: dict[str, Found], relations: dict[str, Relation], remarks: list[str]
) -> str:
    key = _one_line(", ".join(next(iter(relations.values())).key))
    lines = [
        f"{node}: {{table: {_flow([table.schema_name, table.table_name])}}}\n"
        for node, table in both.items()
        if name != f"{table.schema_name}.{table.table_name}"
        and not (table.visible and name == table.table_name)
    ]
    if (named := _key(both)) is not None:
        lines.append(f"key: {_flow(named)}\n")
    fields = [each for relation in relations.values() for each in relation.missing_fields]
    if fields:
        lines.append(f"exclude: {_flow(fields)} # only one node has it; remove this once both do\n")
    lines += [f"# {_one_line(remark)}\n" for remark in remarks]
    start = "name: " if any(not line.startswith("#") for line in lines) else ""
    return f"  - {start}{_scalar(name)} # key: {key}\n" + "".join(f"    {line}" for line in lines)


def _head(nodes: tuple[NodeConfig, NodeConfig], variables: Mapping[str, str]) -> str:
    first, second = nodes
    return (
        "# Proposed by `sync-pipeline init`. Read it, change what you like, then run `sync-pipeline doctor`.\n"
        "# docs/configuration.md describes every option.\n\n"
        "# ${NAME} is read from the environment.\n"
        "nodes:\n"
        f'  {first.name}: {{dsn: "${{{variables[first.name]}}}"}} # wins ties\n'
        f'  {second.name}: {{dsn: "${{{variables[second.name]}}}"}}\n\n'
        "# When both nodes changed the same record: last_update_wins, hold, or a node's name.\n"
        "conflict: last_update_wins\n\n"
        "# The tables that both have, parents first.\n"
        "tables:\n"
    )


def _tail(left_out: dict[str, str]) -> str:
    if not left_out:
        return ""
    lines = "".join(
        f"#   {_one_line(name)}: {_one_line(reason)}\n" for name, reason in sorted(left_out.items())
    )
    return f"\n# Left out:\n{lines}"


def _scalar(name: str) -> str:
    return name if _PLAIN.fullmatch(name) and name not in _YAML_WORDS else json.dumps(name)


def _flow(names: list[str] | tuple[str, ...]) -> str:
    return f"[{', '.join(map(_scalar, names))}]"


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)
