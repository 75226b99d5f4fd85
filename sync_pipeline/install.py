"""Create, upgrade and remove what the pipeline owns on both nodes. Runs twice, or twenty times at once."""

import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import psycopg
from psycopg import sql

from sync_pipeline import capture, catalog, identity, queries, sequences
from sync_pipeline.config import Config
from sync_pipeline.database import Connection, in_words, query, scalar
from sync_pipeline.errors import NotInstalled, PassInterrupted, SyncPipelineError
from sync_pipeline.records import Relation

LOCK_TIMEOUT_SECONDS = 3.0
LOCK_ATTEMPTS = 20


@dataclass(frozen=True, slots=True)
class Step:
    """One statement of an installation, on one node."""

    node: str
    statement: str


def install(
    config: Config, connections: Mapping[str, Connection], *, confirm_identity: bool = False
) -> list[Step]:
    """Create or upgrade the schema and the triggers on both nodes; return what was done, nothing if all was there.

    The catalogs are checked first, so that a wrong configuration changes nothing. Each table's triggers are created
    in a transaction of their own with a short lock timeout, tried again, so that an application is never held up
    behind a waiting lock for long. A database that is not the one that was installed before is refused, unless
    `confirm_identity` says that it takes its place.
    """
    found = catalog.read(config, connections, strict=True)
    done = []
    for step in _identity_steps(config, connections, confirm=confirm_identity):
        _run(connections[step.node], config, [step])
        done.append(step)
    for node in config.nodes:
        connection = connections[node.name]
        for steps in _units(config, node.name, connection, found):
            _with_lock_retries(node.name, lambda: _run(connection, config, steps))  # noqa: B023
            done += steps
    for step in _sequence_steps(config, connections, found):
        connection = connections[step.node]
        _with_lock_retries(step.node, lambda: _run(connection, config, [step]))  # noqa: B023
        done.append(step)
    return done


def plan(
    config: Config, connections: Mapping[str, Connection], *, confirm_identity: bool = False
) -> list[Step]:
    """Return the statements that `install` would run now, and run none."""
    found = catalog.read(config, connections, strict=True)
    confirmed = _identity_steps(config, connections, confirm=confirm_identity)
    units = [
        step
        for node in config.nodes
        for steps in _units(config, node.name, connections[node.name], found)
        for step in steps
    ]
    return [*confirmed, *units, *_sequence_steps(config, connections, found)]


def _identity_steps(
    config: Config, connections: Mapping[str, Connection], *, confirm: bool
) -> list[Step]:
    identity.refuse_one_database(config, connections)
    steps = []
    for node in config.nodes:
        connection = connections[node.name]
        if _version(connection, config.schema_name) is None:
            continue
        if not confirm:
            identity.require(config, node.name, connection)
            continue
        statements = identity.confirmation(config, node.name, connection)
        steps += [Step(node.name, statement) for statement in statements]
    return steps


def _sequence_steps(
    config: Config, connections: Mapping[str, Connection], found: catalog.Catalog
) -> list[Step]:
    if config.sequences == "leave":
        return []
    return [Step(*step) for step in sequences.interleave(config, connections, found)]


def uninstall(config: Config, connections: Mapping[str, Connection]) -> list[Step]:
    """Remove the triggers and the schema from both nodes; the users' tables keep every row."""
    done = []
    for node in config.nodes:
        connection = connections[node.name]
        for schema, table, trigger in _installed_triggers(connection, config.schema_name):
            step = Step(
                node.name,
                sql.SQL("drop trigger if exists {} on {}")
                .format(sql.Identifier(trigger), sql.Identifier(schema, table))
                .as_string(None),
            )
            _with_lock_retries(node.name, lambda: _run(connection, config, [step]))  # noqa: B023
            done.append(step)
        if _schema_exists(connection, config.schema_name):
            step = Step(
                node.name,
                sql.SQL("drop schema {} cascade")
                .format(sql.Identifier(config.schema_name))
                .as_string(None),
            )
            _with_lock_retries(node.name, lambda: _run(connection, config, [step]))  # noqa: B023
            done.append(step)
    return done


def require(config: Config, node: str, connection: Connection) -> None:
    """Raise `NotInstalled` unless the schema of this version is on the node."""
    version = _version(connection, config.schema_name)
    newest = queries.migrations()[-1][0]
    if version is None:
        raise NotInstalled(f"schema {config.schema_name} has no pipeline in it", node=node)
    if version < newest:
        raise NotInstalled(
            f"the schema is version {version}, this program needs {newest}", node=node
        )
    if version > newest:
        raise NotInstalled(
            f"the schema is version {version}, this program knows {newest}",
            node=node,
            remedy="upgrade sync-pipeline",
        )


def missing_captures(config: Config, connection: Connection, relation: Relation) -> list[str]:
    """Return what of a relation's capture is missing, disabled or out of date, in words."""
    wanted = capture.compose(relation, config.schema_name)
    present = _functions(connection, config.schema_name)
    missing = []
    if wanted.function not in present:
        missing.append(f"function {config.schema_name}.{wanted.function} is missing")
    elif present[wanted.function] != wanted.body:
        missing.append(f"function {config.schema_name}.{wanted.function} is out of date")
    for (schema, table), triggers in wanted.triggers.items():
        states = _trigger_states(connection, schema, table)
        for trigger in triggers:
            if trigger.name not in states:
                missing.append(f"trigger {trigger.name} on {schema}.{table} is missing")
            elif states[trigger.name] not in {"O", "A"}:
                missing.append(f"trigger {trigger.name} on {schema}.{table} is disabled")
    return missing


def _units(
    config: Config, node: str, connection: Connection, found: catalog.Catalog
) -> Iterator[list[Step]]:
    """Yield the statements that are still needed, in groups that are one transaction each."""
    yield from _schema_unit(config, node, connection)
    functions = _functions(connection, config.schema_name)
    wanted_functions = set()
    for table in config.tables:
        if not table.sends(node):
            continue
        wanted = capture.compose(found.relation(node, table.name), config.schema_name)
        wanted_functions.add(wanted.function)
        steps = []
        if functions.get(wanted.function) != wanted.body:
            steps.append(Step(node, wanted.create_function))
        for (schema, name), triggers in wanted.triggers.items():
            states = _trigger_states(connection, schema, name)
            steps += [
                Step(node, trigger.create) for trigger in triggers if trigger.name not in states
            ]
        if steps:
            yield steps
    for function in sorted(set(functions) - wanted_functions):
        # A table that left the configuration: its triggers go with its function.
        yield [
            Step(
                node,
                sql.SQL("drop function {}() cascade")
                .format(sql.Identifier(config.schema_name, function))
                .as_string(None),
            )
        ]


def _schema_unit(config: Config, node: str, connection: Connection) -> Iterator[list[Step]]:
    schema = config.schema_name
    version = _version(connection, schema)
    steps = []
    if version is None:
        if not _schema_exists(connection, schema):
            # Asked for only where it is needed: a role that owns the schema may be unable to create one.
            create = sql.SQL("create schema if not exists {}").format(sql.Identifier(schema))
            steps.append(Step(node, create.as_string(None)))
        steps.append(
            Step(
                node,
                queries.compose(
                    "create table if not exists {schema}.sync_migrations "
                    "(version integer primary key, applied_at timestamptz not null default clock_timestamp())",
                    schema,
                ).decode(),
            )
        )
    for number, text in queries.migrations():
        if number > (version or 0):
            steps.append(Step(node, queries.compose(text, schema).decode()))
            steps.append(
                Step(
                    node,
                    sql.SQL("insert into {} (version) values ({})")
                    .format(sql.Identifier(schema, "sync_migrations"), number)
                    .as_string(None),
                )
            )
    if version is None:
        peer = config.other(node).name
        # Conflict numbers are odd on the first node and even on the second: one number names one conflict.
        start = 1 if node == config.first.name else 2
        steps.append(
            Step(
                node,
                sql.SQL(
                    "alter table {} alter column id set start with {} set increment by 2 restart"
                )
                .format(sql.Identifier(schema, "sync_conflicts"), start)
                .as_string(None),
            )
        )
        here = identity.read(connection)
        steps.append(
            Step(
                node,
                sql.SQL(
                    "insert into {} (node, peer, system_identifier, database_oid) values ({}, {}, {}, {})"
                )
                .format(
                    sql.Identifier(schema, "sync_node"),
                    node,
                    peer,
                    here.system_identifier,
                    here.database_oid,
                )
                .as_string(None),
            )
        )
    if steps:
        yield steps


def _run(connection: Connection, config: Config, steps: list[Step]) -> None:
    with connection.transaction():
        connection.execute(
            "select pg_catalog.set_config('lock_timeout', %s, true)", [f"{LOCK_TIMEOUT_SECONDS}s"]
        )
        # Two installations at once take turns; what the first did, the second finds done.
        connection.execute(
            "select pg_catalog.pg_advisory_xact_lock(pg_catalog.hashtext('sync-pipeline install'), "
            "pg_catalog.hashtext(%s))",
            [config.schema_name],
        )
        if _creates_schema(steps) and _version(connection, config.schema_name) is not None:
            return
        for step in steps:
            connection.execute(query(step.statement.encode()))


def _creates_schema(steps: list[Step]) -> bool:
    return steps[0].statement.startswith(("create schema", "create table"))


def _with_lock_retries(node: str, run: Callable[[], None]) -> None:
    last: psycopg.Error = psycopg.errors.LockNotAvailable()
    for attempt in range(LOCK_ATTEMPTS):
        try:
            run()
        except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected) as error:
            last = error
            time.sleep(random.uniform(0.1, 0.3) * (attempt + 1))  # noqa: S311 - jitter
        except psycopg.Error as error:
            raise SyncPipelineError(
                f"cannot install: {in_words(error)}",
                node=node,
                remedy="the role must own the synced tables, and own the pipeline's schema or be able to create it",
            ) from error
        else:
            return
    raise PassInterrupted(
        f"a table stayed locked: {in_words(last)}",
        node=node,
        remedy="end the long transaction that holds it and run install again",
    ) from last


def _schema_exists(connection: Connection, schema: str) -> bool:
    return bool(
        scalar(
            connection,
            b"select to_regnamespace(quote_ident(%(schema)s)) is not null",
            {"schema": schema},
        )
    )


def _version(connection: Connection, schema: str) -> int | None:
    # Read from pg_class, not with to_regclass: after a wait for the other installation that would still answer from
    # a cache which says that there is no such table.
    exists = scalar(
        connection,
        b"select exists (select from pg_catalog.pg_class as class "
        b"join pg_catalog.pg_namespace as namespace on namespace.oid = class.relnamespace "
        b"where namespace.nspname = %(schema)s and class.relname = 'sync_migrations')",
        {"schema": schema},
    )
    if not exists:
        return None
    version = scalar(
        connection, queries.compose("select max(version) from {schema}.sync_migrations", schema)
    )
    return None if version is None else int(version)


def _functions(connection: Connection, schema: str) -> dict[str, str]:
    rows = connection.execute(
        "select proname, prosrc from pg_catalog.pg_proc "
        "where pronamespace = to_regnamespace(quote_ident(%s)) and prorettype = 'trigger'::regtype",
        [schema],
    )
    return dict(rows.fetchall())


def _trigger_states(connection: Connection, schema: str, table: str) -> dict[str, str]:
    rows = connection.execute(
        "select tgname, tgenabled from pg_catalog.pg_trigger "
        "where tgrelid = to_regclass(format('%%I.%%I', %s::text, %s::text)) and not tgisinternal",
        [schema, table],
    )
    return dict(rows.fetchall())


def _installed_triggers(connection: Connection, schema: str) -> list[tuple[str, str, str]]:
    rows = connection.execute(
        "select namespace.nspname, class.relname, trigger.tgname "
        "from pg_catalog.pg_trigger as trigger "
        "join pg_catalog.pg_proc as function on function.oid = trigger.tgfoid "
        "join pg_catalog.pg_class as class on class.oid = trigger.tgrelid "
        "join pg_catalog.pg_namespace as namespace on namespace.oid = class.relnamespace "
        "where function.pronamespace = to_regnamespace(quote_ident(%s)) and trigger.tgparentid = 0 "
        "and not trigger.tgisinternal",
        [schema],
    )
    return [(schema_name, table, trigger) for schema_name, table, trigger in rows]
