"""Examine both nodes before they hurt: connections, servers, the pipeline's own objects, and every synced table.

Nothing is changed. An `error` is what keeps records from being synced or could lose them, a `warning` what can make
some of them fail or differ, an `info` what is worth knowing.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from datetime import datetime
from typing import Any, get_args

import psycopg

from sync_pipeline import catalog, clocks, identity, node_checks, queries, table_checks
from sync_pipeline.config import Config, NodeConfig
from sync_pipeline.database import Connection, connect, error_class, in_words, query, scalar
from sync_pipeline.errors import ConnectionFailed, SyncPipelineError, WrongDatabase
from sync_pipeline.records import Finding, Level

_LEVELS = get_args(Level)


def examine(config: Config) -> list[Finding]:
    """Return everything found on both nodes, errors first. A node that cannot be reached is a finding."""
    findings: list[Finding] = []
    with ExitStack() as stack:
        connections: dict[str, Connection] = {}
        for node in config.nodes:
            try:
                connections[node.name] = stack.enter_context(connect(node, config, "doctor"))
            except ConnectionFailed as error:
                findings.append(Finding.of(error, "connection", node.name))
        servers: dict[str, dict[str, Any]] = {}
        for node in config.nodes:
            if node.name in connections:
                findings += _examined(
                    "server",
                    node.name,
                    lambda: _one(config, node, connections[node.name], servers),  # noqa: B023 - run at once
                )
        if len(servers) == len(config.nodes):
            findings += _examined("link", None, lambda: _both(config, connections, servers))
            findings += _examined("tables", None, lambda: _tables(config, connections))
    return sorted(findings, key=lambda finding: _LEVELS.index(finding.level))


def _examined(check: str, node: str | None, run: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """Collect findings; an examination that PostgreSQL refuses is a finding itself."""
    findings: list[Finding] = []
    try:
        for finding in run():
            findings.append(finding)  # noqa: PERF402 - keeps what came before an error
    except SyncPipelineError as error:
        findings.append(Finding.of(error, check, node))
    except psycopg.errors.InsufficientPrivilege as error:
        findings.append(
            Finding(
                "error",
                "rights",
                node,
                None,
                f"cannot be examined: {in_words(error)}",
                "grant the pipeline's role the right to use it; sql/roles.sql has all that it needs",
            )
        )
    except psycopg.Error as error:
        findings.append(
            Finding(
                "error",
                check,
                node,
                None,
                f"cannot be examined: {in_words(error)}",
                "examine again when the server is up"
                if error_class(error) == "transient"
                else "examine again; where it says the same, report it: doctor should know",
            )
        )
    return findings


def _one(
    config: Config, node: NodeConfig, connection: Connection, servers: dict[str, dict[str, Any]]
) -> Iterator[Finding]:
    servers[node.name] = node_checks.describe(config, connection)
    yield from node_checks.examine(config, node, connection, servers[node.name])


def _both(
    config: Config,
    connections: Mapping[str, Connection],
    servers: Mapping[str, dict[str, Any]],
) -> Iterator[Finding]:
    first, second = (node.name for node in config.nodes)
    one, two = servers[first], servers[second]
    installed = {name: server["installed"] for name, server in servers.items()}
    if not any(installed.values()):
        yield Finding(
            "warning",
            "schema",
            None,
            None,
            "nothing is installed yet",
            "run `sync-pipeline install`",
        )
    elif not all(installed.values()):
        absent = next(name for name, there in installed.items() if not there)
        yield Finding(
            "error",
            "schema",
            absent,
            None,
            f"schema {config.schema_name} has no pipeline in it",
            "run `sync-pipeline install`",
        )
    try:
        identity.refuse_one_database(config, connections)
        if all(installed.values()):
            identity.require_commits(config, connections)
    except WrongDatabase as error:
        yield Finding.of(error, "identity", None)
    if one["version"] != two["version"]:
        yield Finding(
            "info",
            "version",
            None,
            None,
            f"{first} runs PostgreSQL {one['version']}, {second} PostgreSQL {two['version']}",
            "nothing to do: versions may differ, types must exist on both",
        )
    if one["encoding"] != two["encoding"]:
        yield Finding(
            "warning",
            "encoding",
            None,
            None,
            f"{first} stores {one['encoding']}, {second} {two['encoding']}: "
            "a character that the other cannot store makes its record fail",
            "create both databases with the encoding UTF8",
        )
    elif one["encoding"] == "SQL_ASCII":
        yield Finding(
            "warning",
            "encoding",
            None,
            None,
            "SQL_ASCII databases hold bytes that may be no text",
            "create both databases with the encoding UTF8",
        )
    with clocks.reading() as mine:
        mine.clock = _clock(config, connections[first])
    with clocks.reading() as other:
        other.clock = _clock(config, connections[second])
    difference = mine.difference(other)
    limit = config.clock_warning_seconds
    if difference is not None and difference.exceeds(limit):
        yield Finding(
            "warning",
            "clock",
            None,
            None,
            clocks.warning(first, second, difference, limit),
            "let both servers follow the same time servers",
        )


def _clock(config: Config, connection: Connection) -> datetime:
    at: datetime = scalar(connection, query(queries.get("read_clock", config.schema_name)))
    return at


def _tables(config: Config, connections: Mapping[str, Connection]) -> Iterator[Finding]:
    found, problems = catalog.inspect(config, connections)
    for problem in problems:
        yield Finding(
            "error",
            "catalog",
            problem.node,
            problem.table,
            problem.problem,
            problem.remedy or f"correct the table or {config.file}",
        )
    yield from table_checks.examine(config, connections, found)
