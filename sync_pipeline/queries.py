"""The named SQL of `sql/`: one file of queries, one folder of migrations, none of it written in Python."""

import re
from functools import lru_cache
from pathlib import Path

from psycopg import sql

_HERE = Path(__file__).resolve().parent
_NAME = re.compile(r"^-- name: (\w+)\s*$", re.MULTILINE)


def directory() -> Path:
    """Return the folder that holds the SQL: inside an installed package, beside it in a checkout."""
    packaged = _HERE / "sql"
    return packaged if packaged.is_dir() else _HERE.parent / "sql"


@lru_cache
def _named() -> dict[str, str]:
    parts = _NAME.split((directory() / "queries.sql").read_text(encoding="utf-8"))
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@lru_cache(maxsize=1024)
def get(name: str, schema: str) -> bytes:
    """Return the query called `name` for the pipeline's objects in `schema`."""
    return compose(_named()[name].strip().rstrip(";"), schema)


def compose(text: str, schema: str) -> bytes:
    """Put the quoted name of the pipeline's schema where `text` says `{schema}`."""
    return text.replace("{schema}", sql.Identifier(schema).as_string(None)).encode()


@lru_cache
def migrations() -> tuple[tuple[int, str], ...]:
    """Return the schema's migrations in order: (version, SQL with `{schema}`)."""
    files = sorted((directory() / "migrations").glob("[0-9]*.sql"))
    return tuple((int(file.name.split("_")[0]), file.read_text(encoding="utf-8")) for file in files)
