"""SQL conditions that an operator wrote: parsed by the server that will run them, before a statement holds them.

`config_checks` looks at the characters when a file is read; what counts is the server's own parser. A condition is
parsed by itself, by a message of the protocol that takes one statement only, once between parentheses and once between
brackets: no text can close both and go on behind them. Parsing runs nothing.
"""

from psycopg import pq, sql

from sync_pipeline.database import Connection

_FORMS = (
    "select from {} as t where ({})",
    "select from {} as t where (array[{}]::boolean[])[1]",
)


def fault(connection: Connection, schema: str, table: str, condition: str) -> str | None:
    """Say why a condition cannot be used on a table; None when it is one boolean expression on its rows."""
    relation = sql.Identifier(schema, table).as_string(connection)
    for form in _FORMS:
        # Not `execute`: without parameters that runs several statements at once.
        with connection.lock:
            result = connection.pgconn.prepare(b"", form.format(relation, condition).encode())
        if result.status == pq.ExecStatus.FATAL_ERROR:
            said = result.error_field(pq.DiagnosticField.MESSAGE_PRIMARY)
            return (said or b"it cannot be parsed").decode(errors="replace")
    with connection.lock:
        parameters = connection.pgconn.describe_prepared(b"").nparams
    if parameters:
        return "it has a parameter such as $1"
    return None
