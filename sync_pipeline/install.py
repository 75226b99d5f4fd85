"""Create, upgrade and remove what the pipeline owns on both nodes. Runs twice, or twenty times at once."""

import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

import psycopg
from psycopg import sql

from sync_pipeline import capture, catalog, identity, queries, sequences
from sync_pipeline.config import Config
from sync_pipeline.database import Connection, in_words, query, scalar
from sync_pipeline.errors import (
    CatalogMismatch,
    NotInstalled,
    PassInterrupted,
    SyncPipelineError,
    WrongDatabase,
)
from sync_pipeline.records import Relation

LOCK_TIMEOUT_SECONDS = 3.0
# All tables of a node together. PostgreSQL looks for a deadlock after a second, and would end the application.
ALL_LOCKS_SECONDS = 0.9
LOCK_ATTEMPTS = 20

LockMode = Literal["share row exclusive", "access exclusive"]
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Step:
    """One statement of an installation, on one node."""

    node: str
    statement: str


@dataclass(frozen=True, slots=True)
class _Missing:
    """What a node lacks: objects of the schema, and triggers with their tables; and functions of former tables."""

    objects: list[Step]
    triggers: list[Step]
    tables: list[tuple[str, str]]
    superfluous: list[Step]


def install(
    config: Config, connections: Mapping[str, Connection], *, confirm_identity: bool = False
) -> list[Step]:
    """Create or upgrade the schema and the triggers on both nodes; return what was done, nothing if all was there.

    The catalogs are checked first, so that a wrong configuration changes nothing. What one node refuses is not done
    on the other either. Tables are locked for less than a second and then tried again, so that an application is never
    held up behind a waiting lock for long. A database that is not the one that was installed before is refused, unless
    `confirm_identity` says that it takes its place.
    """
    found = catalog.read(config, connections, strict=True)
    confirmed = _identity_steps(config, connections, confirm=confirm_identity)
    identities = _identities(config, connections)

    def create() -> list[_Missing]:
        with _both_or_neither(config, connections):
            _run(connections, confirmed)
            missing = [
                _missing(config, node.name, connections[node.name], found, identities[node.name])
                for node in config.nodes
            ]
            for each in missing:
                _run(connections, each.objects)
            for node, each in zip(config.nodes, missing, strict=True):
                with _on(node.name):
                    _lock(connections[node.name], each.tables, "share row exclusive")
                _run(connections, each.triggers)
        return missing

    missing = _with_lock_retries(create)
    later = [
        *(step for each in missing for step in each.superfluous),
        *_sequence_steps(config, connections, found),
    ]
    for step in later:
        _with_lock_retries(partial(_run_alone, config, connections, step))
    return [*confirmed, *_created(missing), *later]


def plan(
    config: Config, connections: Mapping[str, Connection], *, confirm_identity: bool = False
) -> list[Step]:
    """Return the statements that `install` would run now, and run none."""
    found = catalog.read(config, connections, strict=True)
    confirmed = _identity_steps(config, connections, confirm=confirm_identity)
    identities = _identities(config, connections)
    missing = [
        _missing(config, node.name, connections[node.name], found, identities[node.name])
        for node in config.nodes
    ]
    return [
        *confirmed,
        *_created(missing),
        *(step for each in missing for step in each.superfluous),
        *_sequence_steps(config, connections, found),
    ]


def _created(missing: list[_Missing]) -> Iterator[Step]:
    for each in missing:
        yield from each.objects
        yield from each.triggers


def _identities(
    config: Config, connections: Mapping[str, Connection]
) -> dict[str, identity.Identity]:
    return {node.name: identity.read(connections[node.name]) for node in config.nodes}


def _identity_steps(
    config: Config, connections: Mapping[str, Connection], *, confirm: bool
) -> list[Step]:
    identity.refuse_one_database(config, connections)
    steps = []
    installed = [
        node.name
        for node in config.nodes
        if _version(connections[node.name], config.schema_name) is not None
    ]
    for node in installed:
        if not confirm:
            identity.require(config, node, connections[node])
            continue
        statements = identity.confirmation(config, node, connections[node])
        steps += [Step(node, statement) for statement in statements]
    # What the nodes know of each other's batches is void beside one that is installed anew or lacks commits.
    forgets = len(installed) < len(config.nodes)
    if not forgets:
        try:
            identity.require_commits(config, connections)
        except WrongDatabase:
            if not confirm:
                raise
            forgets = True
    if forgets:
        statement = queries.get("forget_peer", config.schema_name).decode()
        steps += [Step(node, statement) for node in installed]
    return steps


def _sequence_steps(
    config: Config, connections: Mapping[str, Connection], found: catalog.Catalog
) -> list[Step]:
    if config.sequences == "leave":
        return []
    return [Step(*step) for step in sequences.interleave(config, connections, found)]


def uninstall(config: Config, connections: Mapping[str, Connection]) -> list[Step]:
    """Remove the triggers and the schema from both nodes; the users' tables keep every row.

    Refuses, and changes nothing, when anything that is not the pipeline's lies in its schema or depends on it.
    """
    return _with_lock_retries(lambda: _remove(config, connections))


def _remove(config: Config, connections: Mapping[str, Connection]) -> list[Step]:
    done = []
    foreign = []
    with _both_or_neither(config, connections, "uninstall"):
        for node in config.nodes:
            connection = connections[node.name]
            if _version(connection, config.schema_name) is None:
                continue
            with _on(node.name, "uninstall"):
                triggers = _installed_triggers(connection, config.schema_name)
                _lock(connection, [table for table, _ in triggers], "access exclusive")
                for statement in _drops(connection, config.schema_name, triggers):
                    done.append(Step(node.name, statement))
                    foreign += [f"{node.name}: {line}" for line in _drop(connection, statement)]
        if foreign:
            raise SyncPipelineError(
                f"nothing was removed, since objects that are not the pipeline's would go too: {', '.join(foreign)}",
                remedy="move or drop them, then run uninstall again",
            )
    return done


def _drops(
    connection: Connection, schema: str, triggers: list[tuple[tuple[str, str], str]]
) -> Iterator[str]:
    for table, trigger in triggers:
        drop_trigger = sql.SQL("drop trigger {} on {}")
        yield drop_trigger.format(sql.Identifier(trigger), sql.Identifier(*table)).as_string(None)
    for function in _functions(connection, schema):
        yield sql.SQL("drop function {}()").format(sql.Identifier(schema, function)).as_string(None)
    for kind, target in reversed(_own_objects()):
        yield queries.compose(f"drop {kind} if exists {target}", schema).decode()
    yield sql.SQL("drop schema {}").format(sql.Identifier(schema)).as_string(None)


def _drop(connection: Connection, statement: str) -> list[str]:
    """Run a drop and return in words what had to go along: the caller rolls back if there is anything."""
    try:
        with connection.transaction():
            connection.execute(query(statement.encode()))
    except psycopg.errors.DependentObjectsStillExist as error:
        # Gone for the rest of the transaction, so that the next drops name what they find and nothing twice.
        connection.execute(query(f"{statement} cascade".encode()))
        return (error.diag.message_detail or str(error)).splitlines()
    return []


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


def missing_captures(
    config: Config, connection: Connection, relations: Sequence[Relation]
) -> Iterator[tuple[Relation, str]]:
    """Yield what of the capture of some relations of a node is missing, disabled or out of date, in words."""
    present = _functions(connection, config.schema_name)
    for relation in relations:
        for problem in _missing_capture(config, connection, relation, present):
            yield relation, problem


def _missing_capture(
    config: Config, connection: Connection, relation: Relation, present: Mapping[str, str]
) -> list[str]:
    wanted = capture.compose(relation, config.schema_name)
    missing = []
    if wanted.function not in present:
        missing.append(f"function {config.schema_name}.{wanted.function} is missing")
    elif present[wanted.function] != wanted.body:
        missing.append(f"function {config.schema_name}.{wanted.function} is out of date")
    for (schema, table), triggers in wanted.triggers.items():
        states = _trigger_states(connection, config.schema_name, wanted.function, schema, table)
        for trigger in triggers:
            if trigger.name not in states:
                missing.append(f"trigger {trigger.name} on {schema}.{table} is missing")
            elif states[trigger.name] not in {"O", "A"}:
                missing.append(f"trigger {trigger.name} on {schema}.{table} is disabled")
    return missing


def _missing(
    config: Config,
    node: str,
    connection: Connection,
    found: catalog.Catalog,
    here: identity.Identity,
) -> _Missing:
    schema = config.schema_name
    version = _version(connection, schema)
    functions = _functions(connection, schema)
    objects = _schema_steps(config, node, connection, version, here)
    triggers = []
    tables = []
    wanted_functions = set()
    for table in config.tables:
        if not table.sends(node):
            continue
        wanted = capture.compose(found.relation(node, table.name), schema)
        wanted_functions.add(wanted.function)
        if functions.get(wanted.function) != wanted.body:
            objects.append(Step(node, wanted.create_function))
        for name, each in wanted.triggers.items():
            states = _trigger_states(connection, schema, wanted.function, *name)
            steps = [Step(node, trigger.create) for trigger in each if trigger.name not in states]
            triggers += steps
            tables += [name] if steps else []
    names = [] if version is not None else [target for _, target in _own_objects()]
    _refuse_taken_names(config, node, connection, [*names, *(wanted_functions - set(functions))])
    # A table that left the configuration: its triggers go with its function.
    superfluous = [
        Step(
            node,
            sql.SQL("drop function {}() cascade")
            .format(sql.Identifier(schema, function))
            .as_string(None),
        )
        for function in sorted(set(functions) - wanted_functions)
    ]
    return _Missing(objects, triggers, tables, superfluous)


def _own_objects() -> list[tuple[str, str]]:
    """Return kind and name (of a function with its arguments) of all that migrations create, in their order."""
    created = re.compile(
        r"^create (table|view|function) (\{schema\}\.\w+(?:\([^)]*\))?)", re.MULTILINE
    )
    found = [each for _, text in queries.migrations() for each in created.findall(text)]
    return [("table", "{schema}.sync_migrations"), *found]


def _refuse_taken_names(
    config: Config, node: str, connection: Connection, targets: list[str]
) -> None:
    """Raise `CatalogMismatch` when objects that are not the pipeline's have names that it needs."""
    names = [target.removeprefix("{schema}.").partition("(")[0] for target in targets]
    rows = connection.execute(
        "select pg_catalog.pg_describe_object(named.classid, named.oid, 0) from ("
        "select tableoid as classid, oid, relname as name, relnamespace as namespace from pg_catalog.pg_class "
        "union all select tableoid, oid, proname, pronamespace from pg_catalog.pg_proc "
        "union all select tableoid, oid, typname, typnamespace from pg_catalog.pg_type where typrelid = 0"
        ") as named where named.namespace = to_regnamespace(quote_ident(%s)) and named.name = any(%s) order by 1",
        [config.schema_name, names],
    )
    taken = [described for (described,) in rows]
    if taken:
        raise CatalogMismatch(
            f"names that the pipeline needs are taken by objects that are not its own: {', '.join(taken)}",
            node=node,
            remedy=f"rename them, or give the pipeline another `schema` than {config.schema_name} in {config.file}",
        )


def _schema_steps(
    config: Config,
    node: str,
    connection: Connection,
    version: int | None,
    here: identity.Identity,
) -> list[Step]:
    schema = config.schema_name
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
    return steps


@contextmanager
def _both_or_neither(
    config: Config, connections: Mapping[str, Connection], doing: str = "install"
) -> Iterator[None]:
    """Hold a transaction on each node for a `with` block; both commit at its end, neither when it raises."""
    with ExitStack() as stack:
        for node in config.nodes:
            with _on(node.name, doing):
                stack.enter_context(connections[node.name].transaction())
                _take_turn(config, connections[node.name])
        yield


def _take_turn(config: Config, connection: Connection) -> None:
    """Two installations at once take turns; what the first did, the second finds done."""
    connection.execute(
        "select pg_catalog.set_config('lock_timeout', %s, true)", [f"{LOCK_TIMEOUT_SECONDS}s"]
    )
    connection.execute(
        "select pg_catalog.pg_advisory_xact_lock(pg_catalog.hashtext('sync-pipeline install'), "
        "pg_catalog.hashtext(%s))",
        [config.schema_name],
    )


def _lock(connection: Connection, tables: list[tuple[str, str]], mode: LockMode) -> None:
    """Lock tables all at once: who waits behind the first of them does so for less than a deadlock takes to be seen."""
    if not tables:
        return
    before = connection.execute(
        "select current_setting('statement_timeout'), set_config('statement_timeout', %s, true)",
        [f"{ALL_LOCKS_SECONDS}s"],
    ).fetchall()[0][0]
    names = (sql.SQL("only {}").format(sql.Identifier(*name)) for name in sorted(set(tables)))
    connection.execute(
        sql.SQL("lock table {} in {} mode").format(sql.SQL(", ").join(names), sql.SQL(mode))
    )
    connection.execute("select set_config('statement_timeout', %s, true)", [before])


def _run(connections: Mapping[str, Connection], steps: list[Step]) -> None:
    for step in steps:
        with _on(step.node):
            connections[step.node].execute(query(step.statement.encode()))


def _run_alone(config: Config, connections: Mapping[str, Connection], step: Step) -> None:
    with _on(step.node), connections[step.node].transaction():
        _take_turn(config, connections[step.node])
        _run(connections, [step])


@contextmanager
def _on(node: str, doing: str = "install") -> Iterator[None]:
    """Say on which node PostgreSQL refused something, and what to do; `PassInterrupted` is worth another attempt."""
    try:
        yield
    except (
        psycopg.errors.LockNotAvailable,
        psycopg.errors.DeadlockDetected,
        psycopg.errors.QueryCanceled,
    ) as error:
        raise PassInterrupted(
            f"a table stayed locked: {in_words(error)}",
            node=node,
            remedy=f"end the long transaction that holds it and run {doing} again",
        ) from error
    except psycopg.Error as error:
        raise SyncPipelineError(
            f"cannot {doing}: {in_words(error)}",
            node=node,
            remedy="the role must own the synced tables, and own the pipeline's schema or be able to create it",
        ) from error


def _with_lock_retries(run: Callable[[], R]) -> R:
    for attempt in range(1, LOCK_ATTEMPTS):
        try:
            return run()
        except PassInterrupted:
            time.sleep(random.uniform(0.1, 0.3) * attempt)  # noqa: S311 - jitter
    return run()


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
    # a cache which says that there is no such table. Both tables, since one may be somebody else's.
    exists = scalar(
        connection,
        b"select count(*) = 2 from pg_catalog.pg_class as class "
        b"join pg_catalog.pg_namespace as namespace on namespace.oid = class.relnamespace "
        b"where namespace.nspname = %(schema)s and class.relname in ('sync_migrations', 'sync_node')",
        {"schema": schema},
    )
    if not exists:
        return None
    version = scalar(
        connection, queries.compose("select max(version) from {schema}.sync_migrations", schema)
    )
    return None if version is None else int(version)


def _functions(connection: Connection, schema: str) -> dict[str, str]:
    """Return the bodies of the pipeline's capture functions, by name."""
    rows = connection.execute(
        "select proname, prosrc from pg_catalog.pg_proc "
        "where pronamespace = to_regnamespace(quote_ident(%s)) and prorettype = 'trigger'::regtype "
        "and starts_with(proname, 'capture_') and strpos(prosrc, %s) > 0 order by proname",
        [schema, capture.APPLYING],
    )
    return dict(rows.fetchall())


def _trigger_states(
    connection: Connection, own_schema: str, function: str, schema: str, table: str
) -> dict[str, str]:
    """Return the triggers of a table that call a capture function. Those of a renamed one may call another's."""
    rows = connection.execute(
        "select trigger.tgname, trigger.tgenabled from pg_catalog.pg_trigger as trigger "
        "join pg_catalog.pg_proc as called on called.oid = trigger.tgfoid "
        "where called.pronamespace = to_regnamespace(quote_ident(%s)) and called.proname = %s "
        "and trigger.tgrelid = to_regclass(format('%%I.%%I', %s::text, %s::text)) and not trigger.tgisinternal",
        [own_schema, function, schema, table],
    )
    return dict(rows.fetchall())


def _installed_triggers(connection: Connection, schema: str) -> list[tuple[tuple[str, str], str]]:
    """Return table and name of each trigger of the pipeline."""
    rows = connection.execute(
        "select namespace.nspname, class.relname, trigger.tgname "
        "from pg_catalog.pg_trigger as trigger "
        "join pg_catalog.pg_proc as function on function.oid = trigger.tgfoid "
        "join pg_catalog.pg_class as class on class.oid = trigger.tgrelid "
        "join pg_catalog.pg_namespace as namespace on namespace.oid = class.relnamespace "
        "where function.pronamespace = to_regnamespace(quote_ident(%s)) and trigger.tgparentid = 0 "
        "and not trigger.tgisinternal and trigger.tgname = any(%s)",
        [schema, list(capture.trigger_names(schema))],
    )
    return [((schema_name, table), trigger) for schema_name, table, trigger in rows]
