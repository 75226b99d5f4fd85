"""Connections to the two nodes, and what an error of PostgreSQL means for the caller."""

import re
import select
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, LiteralString, Self, cast

import psycopg
from psycopg import sql
from psycopg.abc import Params
from psycopg.conninfo import make_conninfo
from psycopg.rows import Row

from sync_pipeline.config import Config, NodeConfig
from sync_pipeline.errors import ConnectionFailed, without_passwords
from sync_pipeline.records import TEXT_SETTINGS

Connection = psycopg.Connection[tuple[Any, ...]]
Statement = LiteralString | bytes | sql.Composed | sql.SQL

CONNECT_TIMEOUT_SECONDS = 10
IDLE_IN_TRANSACTION_SECONDS = 600
# A reader keeps its snapshot while a batch is applied to the other node, however long that takes.
READER_IDLE_IN_TRANSACTION_SECONDS = 3600

# A client that vanishes is noticed by the server, so that its lock becomes free: within a second when its process was
# killed in the middle of a statement, within a minute when its machine is gone.
_SESSION = TEXT_SETTINGS | {
    "client_encoding": "UTF8",
    "xmloption": "content",
    "standard_conforming_strings": "on",
    "array_nulls": "on",
    "default_transaction_isolation": "read committed",
    "default_transaction_deferrable": "off",
    # A policy that hides rows would look like deletes: fail instead.
    "row_security": "off",
    "jit": "off",
    # A commit that no longer waits for its standby says so with a warning.
    "client_min_messages": "warning",
    "client_connection_check_interval": "500",
    "idle_session_timeout": "0",
}

# How long either end believes in a peer that says nothing. Keepalives alone are not enough: they rest while something
# that was sent is not acknowledged, and then Linux would go on trying for a quarter of an hour.
_PATIENCE = {
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 4,
    "tcp_user_timeout": 30_000,
}

ErrorClass = Literal["transient", "catalog", "data"]

# Connection lost, resources, operator intervention, serialization and deadlock, lock timeouts, read-only standby.
_TRANSIENT_CLASSES = {"08", "25", "40", "53", "55", "57", "58", "72", "XX", "F0"}
# What a value or a record is to blame for.
DATA_CLASSES = {"21", "22", "23", "27", "2F", "38", "39", "44", "54", "P0"}
# What the schema, the rights or the program's own SQL is to blame for; all else is said of a record, an application's
# own SQLSTATEs included.
_CATALOG_CLASSES = {"0A", "0L", "0P", "26", "28", "2B", "34", "3D", "3F", "42", "HV"}
_LOCK_NOT_AVAILABLE = "55P03"
_RAISED = "exec_stmt_raise"  # The function of PostgreSQL behind RAISE in PL/pgSQL: the text is the application's.
# What a function of the application that runs because of a record is to blame for: a name that it does not find.
_CODE_CLASSES = _CATALOG_CLASSES | {"55"}
# Lines of the context of an error, in whatever language the server speaks: one that names a function in a procedural
# language, one of ours among these, and one that names a function in SQL that is none of ours.
_FUNCTION = re.compile(r"PL/\w")
_OUR_FUNCTION = re.compile(r"(?<!\w)(?:try_each|has_lost_rows)\(")
_CAPTURE_FUNCTION = re.compile(r"(?<!\w)capture_\w+\(\)")
_SQL_FUNCTION = re.compile(
    r'^(?:SQL function "|[^"«»]*SQL[^"«»]*["«»]\s?(?=[^"«»\s]+\s?["«»])|"(?=\S+" SQL))'
    "(?!has_events|events_|next_events)"
)
# What our capture functions do beside a test of a setting. An application can call one of its own `capture_payment`.
_CAPTURED = "sync_events (table_name, record_id, event_type, caused_by)"


# What to do where a server has answered, by what it says; in another language than English nobody is told.
_REMEDIES = (
    (
        "too many (clients|connections)|remaining connection slots",
        "end sessions that nobody needs, or raise the limit; a consumer needs two or three to each node",
    ),
    (
        "hot standby mode",
        "let the dsn lead to the primary, or list both servers in it: host=one,two",
    ),
)

# PostgreSQL looks up values of a list in a hash table from this length on.
_LONG = 9


class _Cursor(psycopg.Cursor[Row]):
    """Takes `%` in the names and literals of a composed statement as it is, though there are parameters.

    And lets PostgreSQL plan a statement for the values of a long list.
    """

    def execute(
        self,
        query: Any,
        params: Params | None = None,
        *,
        prepare: bool | None = None,
        binary: bool | None = None,
    ) -> Self:
        if params is not None and isinstance(query, sql.Composed):
            query = compiled(query)
        if prepare is None and isinstance(params, Mapping) and any(map(_is_long, params.values())):
            # Planned for these values. A prepared plan would compare every row with one after the other.
            prepare = False
        return super().execute(query, params, prepare=prepare, binary=binary)


def _is_long(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) >= _LONG


def compiled(statement: sql.Composed) -> LiteralString:
    """Return a composed statement with parameters as it is sent, to be kept where it is executed again and again."""
    return query(sql.Composed([_escaped(part) for part in statement]).as_bytes(None))


def _escaped(part: sql.Composable) -> sql.Composable:
    if isinstance(part, sql.Composed):
        return sql.Composed([_escaped(inner) for inner in part])
    if isinstance(part, sql.SQL | sql.Placeholder):
        return part
    return sql.SQL(part.as_string(None).replace("%", "%%"))


class _Connection(psycopg.Connection[Any]):
    """A connection whose errors know their node."""

    node: str | None = None

    def wait(self, *arguments: Any, **options: Any) -> Any:
        """Wait for an answer, as every statement does."""
        try:
            return super().wait(*arguments, **options)
        except psycopg.Error as error:
            _note_node(error, self)
            raise


class Question:
    """A short query, asked of one connection again and again: `$1` stands for a number, all columns are text.

    It goes past psycopg's cursors, which cost an idle loop more than all else: whoever sleeps in between finds nothing
    of what he needs in the caches of his core.
    """

    def __init__(self, connection: Connection, name: str, statement: bytes) -> None:
        self._connection = connection
        self._name = name.encode()
        self._preparation = b"prepare " + self._name + b" as " + statement
        self._answered = select.poll()
        self._answered.register(connection.fileno(), select.POLLIN)

    def ask(self, *values: int) -> tuple[str, ...]:
        """Return the one row of the answer. Raises what `execute` raises."""
        try:
            try:
                answer = self._answer(values)
            except psycopg.errors.InvalidSqlStatementName:
                # The first time; and psycopg lets a session forget all of them after a ROLLBACK or DROP.
                self._connection.execute(self._preparation)
                answer = self._answer(values)
        except psycopg.Error as error:
            _note_node(error, self._connection)
            raise
        return tuple((answer.get_value(0, n) or b"").decode() for n in range(answer.nfields))

    def _answer(self, values: tuple[int, ...]) -> psycopg.pq.abc.PGresult:
        session = self._connection.pgconn
        session.send_query_prepared(self._name, [b"%d" % value for value in values])
        answer = None
        # To ask for a result that is not there yet would wait where no signal is noticed.
        while (result := self._next_result(session)) is not None:
            answer = result
        if answer is None:
            raise psycopg.OperationalError("the connection is lost")
        if answer.status != psycopg.pq.ExecStatus.TUPLES_OK:
            raise psycopg.errors.error_from_result(answer, self._connection.info.encoding)
        return answer

    def _next_result(self, session: psycopg.pq.abc.PGconn) -> psycopg.pq.abc.PGresult | None:
        while session.is_busy():
            self._answered.poll()
            session.consume_input()
        return session.get_result()


def _note_node(error: psycopg.Error, connection: Connection) -> None:
    error.__dict__["node"] = getattr(connection, "node", None)


def node_of(error: psycopg.Error) -> str | None:
    """Return the node whose connection an error came from."""
    return error.__dict__.get("node")


def connect(node: NodeConfig, config: Config, role: str) -> Connection:
    """Open a connection with the pipeline's session settings. Raises `ConnectionFailed`, without any secret.

    It leads to a primary, whatever the DSN says: a standby may lag behind what the other connections know. Only
    `doctor` looks at a standby, and says what it is.
    """
    attributes = {} if role == "doctor" else {"target_session_attrs": "primary"}
    try:
        connection = _Connection.connect(
            make_conninfo(node.dsn.get_secret_value(), **_PATIENCE, **attributes),
            autocommit=True,
            cursor_factory=_Cursor,
            connect_timeout=CONNECT_TIMEOUT_SECONDS,
            application_name=f"sync-pipeline {config.schema_name} {role}",
        )
    except psycopg.Error as error:
        if _splits_a_password(node):
            # Not chained: the message may hold a part of the password.
            cause, said = (
                None,
                "the password in its dsn has special characters that are not %-escaped",
            )
        else:
            cause, said = error, in_words(error)
        raise ConnectionFailed(
            f"cannot connect: {said}",
            node=node.name,
            remedy=next(
                (remedy for sign, remedy in _REMEDIES if re.search(sign, said)),
                "check the dsn, the network and pg_hba.conf",
            ),
        ) from cause
    connection.node = node.name
    idle = READER_IDLE_IN_TRANSACTION_SECONDS if role == "reader" else IDLE_IN_TRANSACTION_SECONDS
    settings = _SESSION | {
        **{f"tcp_{name.removeprefix('tcp_')}": str(value) for name, value in _PATIENCE.items()},
        "lock_timeout": f"{int(config.lock_timeout_seconds * 1000)}",
        "statement_timeout": f"{int(config.statement_timeout_seconds * 1000)}",
        "idle_in_transaction_session_timeout": f"{idle * 1000}",
    }
    if connection.info.server_version >= 170000:
        settings["transaction_timeout"] = "0"
    try:
        connection.execute(
            sql.SQL("select {}, {}").format(
                sql.SQL(", ").join(
                    sql.SQL("pg_catalog.set_config({}, {}, false)").format(name, value)
                    for name, value in settings.items()
                ),
                # A server that crashed must not forget a batch that the other node has heard was committed.
                sql.SQL(
                    "case pg_catalog.current_setting('synchronous_commit') "
                    "when 'off' then pg_catalog.set_config('synchronous_commit', 'on', false) end"
                ),
            )
        )
    except psycopg.Error as error:
        connection.close()
        raise ConnectionFailed(
            f"cannot prepare the session: {in_words(error)}", node=node.name
        ) from error
    return connection


def _splits_a_password(node: NodeConfig) -> bool:
    """True for a URI with unescaped `@`, `/`, `:` or `#` in its password: libpq takes a part of it for the host."""
    written = re.match(r"\w+://[^:@/]*:([^?]*)@", node.dsn.get_secret_value())
    return written is not None and re.search("[@/:#]", written[1]) is not None


@contextmanager
def connected(node: NodeConfig, config: Config, role: str) -> Iterator[Connection]:
    """Open a connection for a `with` block and close it at its end."""
    connection = connect(node, config, role)
    try:
        yield connection
    finally:
        connection.close()


def error_class(error: psycopg.Error) -> ErrorClass:
    """Say what an error asks for: wait (`transient`), look at the schema (`catalog`) or at the record (`data`)."""
    state = error.sqlstate
    if state is None:
        # Without the server: a connection that broke, or a statement of ours that could not be sent.
        is_broken = isinstance(error, psycopg.OperationalError | psycopg.InterfaceError)
        return "transient" if is_broken else "catalog"
    if _is_of_application(error.diag) and (
        error.diag.source_function == _RAISED
        or (state[:2] in _CODE_CLASSES and state != _LOCK_NOT_AVAILABLE)
    ):
        return "data"
    if state[:2] in _TRANSIENT_CLASSES:
        return "transient"
    if error.diag.source_function == _RAISED:
        return "data"
    return "catalog" if state[:2] in _CATALOG_CLASSES else "data"


def _is_of_application(said: psycopg.errors.Diagnostic) -> bool:
    """True when a function that is none of ours was on the way to an error."""
    context = said.context or ""
    captured = _CAPTURED in f"{context} {said.internal_query or ''}".replace('"', "")
    return any(
        _SQL_FUNCTION.search(line)
        or (
            _FUNCTION.search(line)
            and not _OUR_FUNCTION.search(line)
            and not (captured and _CAPTURE_FUNCTION.search(line))
        )
        for line in context.splitlines()
    )


def in_words(error: psycopg.Error) -> str:
    """Say in one line what PostgreSQL said, for logs: no value of a row, and no password.

    A message about a record quotes its values, so of such an error only its name and what it names are repeated.
    """
    if error_class(error) == "data" or error.diag.source_function == _RAISED:
        diag = error.diag
        condition = re.sub(r"(?<!^)(?=[A-Z])", " ", type(error).__name__).lower()
        named = {
            "table": diag.table_name,
            "column": diag.column_name,
            "constraint": diag.constraint_name,
        }
        names = "".join(f", {kind} {name}" for kind, name in named.items() if name)
        return f"{condition} (SQLSTATE {error.sqlstate}{names})"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return without_passwords(lines[0])


def query(text: bytes) -> LiteralString:
    """Mark SQL that came from `sql/` or from `psycopg.sql` as safe for psycopg's strict typing."""
    return cast("LiteralString", text)


def server_encoding(connection: Connection) -> str:
    """Return the encoding of the connected database, such as `UTF8`."""
    return connection.info.parameter_status("server_encoding") or "UTF8"


def scalar(
    connection: Connection, statement: Statement, parameters: dict[str, Any] | None = None
) -> Any:
    """Return the first column of the first row, or None when there is no row."""
    row = connection.execute(statement, parameters).fetchone()
    return None if row is None else row[0]
