"""Checks of the single values of a configuration: names, connection strings, SQL conditions.

No message repeats a value that came from the environment or stands where a connection string belongs.
"""

import re

import psycopg
from psycopg.conninfo import conninfo_to_dict
from pydantic import SecretStr
from pydantic_core import PydanticCustomError

POLICIES = ("last_update_wins", "hold")
TABLE_OPTIONS = ("name", "key", "exclude", "source", "conflict", "where")
IDENTIFIER_BYTES = 63

Place = tuple[str | int, ...]

SHOWABLE = re.compile(r"[\w.$-]{1,63}")


def wrong(problem: str, remedy: str) -> PydanticCustomError:
    """The error of a value: what was found, and what to do."""
    return PydanticCustomError(
        "problem", "{problem}; {remedy}", {"problem": problem, "remedy": remedy}
    )


def identifier(name: str) -> str:
    """A name as the catalog has it, of a length that PostgreSQL keeps."""
    if not name:
        raise wrong("is empty", "write the name as it is in the catalog")
    if len(name.encode()) > IDENTIFIER_BYTES:
        raise wrong(
            f"is longer than {IDENTIFIER_BYTES} bytes",
            "PostgreSQL cuts such names; write the name as it is in the catalog",
        )
    if "\0" in name:
        raise wrong("contains a NUL character", "write the name as it is in the catalog")
    if len(name) > 1 and name[0] == name[-1] == '"':
        raise wrong("is in SQL quotes", "write the name as it is in the catalog, without them")
    return name


def relation(value: object) -> object:
    """`table`, `schema.table` or `[schema, table]` as a pair; anything else is left to pydantic."""
    if isinstance(value, str):
        parts = value.split(".")
        if len(parts) > 2:
            raise wrong("has more than one dot", "write [schema, table] if a name contains a dot")
        schema, table = (None, *parts)[-2:]
    elif isinstance(value, list | tuple) and len(value) in (1, 2):
        schema, table = (None, *value)[-2:]
    else:
        return value
    if not isinstance(table, str) or not (schema is None or isinstance(schema, str)):
        return value
    return (None if schema is None else identifier(schema), identifier(table))


def table_name(name: str) -> str:
    """The name of a table in events, logs and commands; it can be a relation."""
    relation(name)
    return name


def schema_name(name: str) -> str:
    """The name of the pipeline's own schema: plain, and neither PostgreSQL's nor the application's."""
    remedy = "choose a plain name for a schema that belongs to the pipeline alone, such as `sync`"
    if not re.fullmatch(r"[^\W\d][\w$]*", identifier(name)):
        raise wrong("is not letters, digits and underscores", remedy)
    if name.startswith("pg_"):
        raise wrong("starts with `pg_`, which PostgreSQL reserves", remedy)
    if name in ("public", "information_schema"):
        raise wrong("is a schema of PostgreSQL or of the application", remedy)
    return name


def node_name(name: str) -> str:
    """The name of a node: plain, and none that an option or a policy has."""
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,30}", name):
        raise wrong("is no node name", "use at most 31 of a-z, 0-9 and _, beginning with a letter")
    if name in (*TABLE_OPTIONS, *POLICIES):
        raise wrong("is an option's or a policy's own name", "call the node something else")
    return name


_CONNINFO_FAULTS = {
    "invalid URI query parameter": "has a parameter after `?` that PostgreSQL does not know",
    "invalid connection option": "has an option that PostgreSQL does not know, or an unquoted space",
    "invalid percent-encoded token": "has a `%` that begins no %-escape",
    "unterminated quoted string": "opens a quote that it does not close",
}


def conninfo(dsn: SecretStr) -> SecretStr:
    """A connection string that libpq understands. No message repeats any of it."""
    text = dsn.get_secret_value().strip()
    remedy = (
        "write postgresql://user@host:5432/database or host=… port=… user=… dbname=…, "
        "with %-escapes in the first form and quotes in the second for special characters"
    )
    if not text:
        raise wrong("is empty", remedy)
    fault = "contains a NUL character" if "\0" in text else None
    try:
        conninfo_to_dict(text)
    except (psycopg.Error, UnicodeError) as error:
        # libpq quotes the part it does not understand, which may be the password: repeat none of it.
        said = str(error)
        faults = (words for start, words in _CONNINFO_FAULTS.items() if said.startswith(start))
        fault = next(faults, "is not a PostgreSQL connection string (not shown here)")
    if fault:
        raise wrong(fault, remedy)
    return SecretStr(text)


def condition(sql: str) -> str:
    """An SQL condition, as it would stand after WHERE."""
    if not sql.strip():
        raise wrong("is empty", "remove it, or write a condition")
    fault = fault_in_condition(sql)
    if fault:
        raise wrong(fault, "write one SQL condition, as it would stand after WHERE")
    return sql


_SQL_TOKEN = re.compile(
    r"""(?P<escaped>(?<![\w$])(?:\d[\w.]*)?[eE]'(?:[^'\\]|''|\\.)*')
      | (?P<string>'(?:[^']|'')*')
      | (?P<name>"(?:[^"]|"")*")
      | (?P<dollar>(?<![\w$])\$(?P<tag>(?:[^\W\d]\w*)?)\$.*?\$(?P=tag)\$)
      | (?P<comment>--|/\*)
      | (?P<end>;)
      | (?P<open>\()
      | (?P<close>\))
      | (?P<unclosed>'|"|(?<![\w$])\$(?:[^\W\d]\w*)?\$)
    """,
    re.VERBOSE | re.DOTALL,
)


def fault_in_condition(sql: str) -> str | None:
    """Say why `sql` cannot stand after WHERE as one condition; None when nothing speaks against it."""
    if "\0" in sql:
        return "contains a NUL character"
    if not storable(sql):
        return "contains half a character, so it is no valid UTF-8"
    depth = 0
    for token in _SQL_TOKEN.finditer(sql):
        match token.lastgroup:
            case "comment":
                return f"contains the comment `{token.group()}` outside of a string"
            case "end":
                return "contains `;` outside of a string, so it would be several statements"
            case "unclosed":
                return "opens a quote that it does not close"
            case "open":
                depth += 1
            case "close":
                depth -= 1
        if depth < 0:
            break
    return "has parentheses that do not match" if depth else None


def spell(place: Place) -> str | None:
    """Spell `("tables", 1, "key")` as `tables[1].key`; a key that is no name may be a secret."""
    spelled = ""
    for part in place:
        if isinstance(part, int):
            spelled += f"[{part}]"
        else:
            spelled += "." + (part if SHOWABLE.fullmatch(part) else "(not a name)")
    return spelled.removeprefix(".") or None


def storable(text: str) -> bool:
    """Whether PostgreSQL can hold the text: no NUL, no half of a surrogate pair."""
    return not re.search("[\0\ud800-\udfff]", text)
