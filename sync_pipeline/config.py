"""`sync.yaml` as frozen values: two nodes, the tables they share, and how the pipeline behaves.

`load` reads a file, `parse` a text; both report everything that is wrong in one `ConfigurationError`.
No message repeats a value that came from the environment or stands where a connection string belongs.
"""

import difflib
import os
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import psycopg
import yaml
from psycopg.conninfo import conninfo_to_dict
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    WrapSerializer,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from sync_pipeline.errors import ConfigurationError, Problem

DEFAULT_PATH = "sync.yaml"
PATH_VARIABLE = "SYNC_CONFIG"
POLICIES = ("last_update_wins", "hold")
TABLE_OPTIONS = ("name", "key", "exclude", "source", "conflict", "where")
IDENTIFIER_BYTES = 63
DOCUMENT_VALUES = 100_000  # Aliases of aliases make a small file explode; no real one comes near.

Place = tuple[str | int, ...]
Relation = tuple[str | None, str]
T = TypeVar("T", bound=Hashable)


class FrozenMap(Mapping[str, T], Generic[T]):
    """A mapping that cannot change and can be hashed, copied and pickled."""

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[str, T] | None = None) -> None:
        self._items = dict(items or {})

    def __getitem__(self, key: str) -> T:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)


def load(path: Path | str | None = None, environ: Mapping[str, str] = os.environ) -> "Config":
    """Read the file at `path`, else at `$SYNC_CONFIG`, else `./sync.yaml`."""
    file = Path(path or environ.get(PATH_VARIABLE) or DEFAULT_PATH)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        problem = "does not exist"
        remedy = f"copy sync.example.yaml there, or name another with --config or ${PATH_VARIABLE}"
    except UnicodeDecodeError as error:
        problem, remedy = f"is not UTF-8 at byte {error.start}", "save it as UTF-8"
    except OSError as error:
        problem, remedy = f"cannot be read: {error.strerror}", "check the path and its permissions"
    except ValueError:
        problem, remedy = "is not a path", "check it for NUL characters"
    else:
        return parse(text, environ, file=str(file), path=file)
    # Outside the handlers, so that no traceback shows what was read.
    raise ConfigurationError(problem, file=str(file), remedy=remedy)


def parse(
    text: str,
    environ: Mapping[str, str] = os.environ,
    *,
    file: str = DEFAULT_PATH,
    path: Path | None = None,
) -> "Config":
    """Read the text of a configuration file; `file` is its name in messages."""
    reading = _Reading(text, environ, file)
    config = reading.config(path)
    if reading.problems or config is None:
        raise ConfigurationError.of(reading.sorted_problems())
    return config


# ---- the values -------------------------------------------------------------------------------


def _wrong(problem: str, remedy: str) -> PydanticCustomError:
    return PydanticCustomError(
        "problem", "{problem}; {remedy}", {"problem": problem, "remedy": remedy}
    )


def _identifier(name: str) -> str:
    if not name:
        raise _wrong("is empty", "write the name as it is in the catalog")
    if len(name.encode()) > IDENTIFIER_BYTES:
        raise _wrong(
            f"is longer than {IDENTIFIER_BYTES} bytes",
            "PostgreSQL cuts such names; write the name as it is in the catalog",
        )
    if "\0" in name:
        raise _wrong("contains a NUL character", "write the name as it is in the catalog")
    if len(name) > 1 and name[0] == name[-1] == '"':
        raise _wrong("is in SQL quotes", "write the name as it is in the catalog, without them")
    return name


def _relation(value: object) -> object:
    if isinstance(value, str):
        parts = value.split(".")
        if len(parts) > 2:
            raise _wrong("has more than one dot", "write [schema, table] if a name contains a dot")
        schema, table = (None, *parts)[-2:]
    elif isinstance(value, list | tuple) and len(value) in (1, 2):
        schema, table = (None, *value)[-2:]
    else:
        return value
    if not isinstance(table, str) or not (schema is None or isinstance(schema, str)):
        return value
    return (None if schema is None else _identifier(schema), _identifier(table))


def _table_name(name: str) -> str:
    _relation(name)
    return name


def _schema_name(name: str) -> str:
    remedy = "choose a plain name for a schema that belongs to the pipeline alone, such as `sync`"
    if not re.fullmatch(r"[^\W\d][\w$]*", _identifier(name)):
        raise _wrong("is not letters, digits and underscores", remedy)
    if name.startswith("pg_"):
        raise _wrong("starts with `pg_`, which PostgreSQL reserves", remedy)
    if name in ("public", "information_schema"):
        raise _wrong("is a schema of PostgreSQL or of the application", remedy)
    return name


def _node_name(name: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,30}", name):
        raise _wrong("is no node name", "use at most 31 of a-z, 0-9 and _, beginning with a letter")
    if name in (*TABLE_OPTIONS, *POLICIES):
        raise _wrong("is an option's or a policy's own name", "call the node something else")
    return name


_CONNINFO_FAULTS = {
    "invalid URI query parameter": "has a parameter after `?` that PostgreSQL does not know",
    "invalid connection option": "has an option that PostgreSQL does not know, or an unquoted space",
    "invalid percent-encoded token": "has a `%` that begins no %-escape",
    "unterminated quoted string": "opens a quote that it does not close",
}


def _conninfo(dsn: SecretStr) -> SecretStr:
    text = dsn.get_secret_value().strip()
    remedy = (
        "write postgresql://user@host:5432/database or host=… port=… user=… dbname=…, "
        "with %-escapes in the first form and quotes in the second for special characters"
    )
    if not text:
        raise _wrong("is empty", remedy)
    fault = "contains a NUL character" if "\0" in text else None
    try:
        conninfo_to_dict(text)
    except (psycopg.Error, UnicodeError) as error:
        # libpq quotes the part it does not understand, which may be the password: repeat none of it.
        said = str(error)
        faults = (words for start, words in _CONNINFO_FAULTS.items() if said.startswith(start))
        fault = next(faults, "is not a PostgreSQL connection string (not shown here)")
    if fault:
        raise _wrong(fault, remedy)
    return SecretStr(text)


def _condition(sql: str) -> str:
    if not sql.strip():
        raise _wrong("is empty", "remove it, or write a condition")
    fault = fault_in_condition(sql)
    if fault:
        raise _wrong(fault, "write one SQL condition, as it would stand after WHERE")
    return sql


_SQL_TOKEN = re.compile(
    r"""(?P<escaped>(?<![\w$])[eE]'(?:[^'\\]|''|\\.)*')
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


def _as_dict(value: Mapping[str, Any], handler: Any) -> Any:
    return handler(dict(value))


Identifier = Annotated[str, AfterValidator(_identifier)]
_FROZEN = (AfterValidator(FrozenMap), WrapSerializer(_as_dict))
IdentifierMap = Annotated[Mapping[str, Identifier], *_FROZEN]
ConditionMap = Annotated[Mapping[str, Annotated[str, AfterValidator(_condition)]], *_FROZEN]


class _Model(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
        validate_by_name=True,
        validate_by_alias=True,
        allow_inf_nan=False,
    )


M = TypeVar("M", bound=_Model)


class NodeConfig(_Model):
    """One of the two databases. Its connection string shows in no `repr` and no message."""

    name: Annotated[str, AfterValidator(_node_name)]
    dsn: Annotated[SecretStr, AfterValidator(_conninfo)] = Field(
        description="a PostgreSQL connection string"
    )


class SideConfig(_Model):
    """What a table is called on one node, where that differs."""

    table: Annotated[Relation, BeforeValidator(_relation)] | None = Field(
        default=None, description="a table as `table`, `schema.table` or [schema, table]"
    )
    columns: IdentifierMap = Field(
        default=FrozenMap(), description="columns by field, as in {amount: total}"
    )


SideMap = Annotated[Mapping[str, SideConfig], *_FROZEN]


class TableConfig(_Model):
    """A table that both nodes have, and how its records travel."""

    name: Annotated[str, AfterValidator(_table_name)] = Field(description="the name of a table")
    sides: SideMap = Field(default=FrozenMap())
    key: tuple[Identifier, ...] | None = Field(
        default=None, min_length=1, description="a list of at least one field"
    )
    exclude: tuple[Identifier, ...] = Field(default=(), description="a list of fields")
    source: str | None = Field(default=None, description="the name of a node")
    conflict: str | None = Field(default=None, description="a policy or the name of a node")
    conditions: ConditionMap = Field(
        default=FrozenMap(),
        alias="where",
        description="conditions by node, as in {crm: \"state <> 'draft'\"}",
    )

    @property
    def policy(self) -> str:
        """`last_update_wins`, `hold`, or the name of the node that wins."""
        return self.conflict if self.conflict is not None else POLICIES[0]

    def relation(self, node: str) -> Relation:
        """The schema (`None`: the search path decides) and name of the table on `node`."""
        side = self.sides.get(node)
        if side is not None and side.table is not None:
            return side.table
        schema, dot, table = self.name.rpartition(".")
        return (schema if dot else None, table)

    def column(self, node: str, field: str) -> str:
        """The column that holds `field` on `node`."""
        side = self.sides.get(node)
        return side.columns.get(field, field) if side is not None else field

    def sends(self, node: str) -> bool:
        """Whether changes made on `node` go to the other node."""
        return self.source is None or self.source == node

    def where(self, node: str) -> str | None:
        """The SQL condition on the rows that `node` sends; not parenthesised."""
        return self.conditions.get(node)


class RetryConfig(_Model):
    """When a record that failed is tried again, and when it is given up."""

    max_attempts: int = Field(
        default=10, ge=1, le=1_000_000, description="a whole number from 1 to 1000000"
    )
    base_seconds: float = Field(
        default=2.0, gt=0, le=31_536_000, description="seconds above 0, at most 31536000"
    )
    max_seconds: float = Field(
        default=3600.0, gt=0, le=31_536_000, description="seconds above 0, at most 31536000"
    )

    @model_validator(mode="after")
    def _check_order(self) -> "RetryConfig":
        if self.base_seconds > self.max_seconds:
            raise _wrong("base_seconds is above max_seconds", "lower the one or raise the other")
        return self


class _Options(_Model):
    schema_name: Annotated[str, AfterValidator(_schema_name)] = Field(
        default="sync", alias="schema", description="the name of a schema"
    )
    batch_size: int = Field(
        default=10_000, ge=1, le=1_000_000, description="a whole number from 1 to 1000000"
    )
    poll_seconds: float = Field(
        default=0.1, gt=0, le=3600, description="seconds above 0, at most 3600"
    )
    retry: RetryConfig = Field(default=RetryConfig(), description="a mapping of options")
    conflict: str = Field(default=POLICIES[0], description="a policy or the name of a node")
    conflict_retention_days: int = Field(
        default=30, ge=1, le=36_500, description="a whole number of days from 1 to 36500"
    )
    # PostgreSQL counts timeouts in milliseconds and reads 0 as "none".
    lock_timeout_seconds: float = Field(
        default=10.0, ge=0.001, le=86_400, description="seconds from 0.001 to 86400"
    )
    statement_timeout_seconds: float = Field(
        default=0.0, ge=0, le=86_400, description="seconds from 0.001 to 86400, or 0 for none"
    )
    clock_warning_seconds: float = Field(
        default=5.0, gt=0, le=86_400, description="seconds above 0, at most 86400"
    )
    sequences: Literal["leave", "interleave"] = Field(
        default="leave", description="`leave` or `interleave`"
    )

    @field_validator("statement_timeout_seconds")
    @classmethod
    def _check_milliseconds(cls, seconds: float) -> float:
        if 0 < seconds < 0.001:
            raise _wrong("is below a millisecond", "write 0 for none, or at least 0.001")
        return seconds


class Config(_Options):
    """A whole configuration. The node listed first wins ties."""

    nodes: tuple[NodeConfig, NodeConfig]
    tables: tuple[TableConfig, ...] = Field(min_length=1)
    path: Path | None = None

    @field_validator("tables")
    @classmethod
    def _fill_policy(cls, tables: tuple[TableConfig, ...], info: Any) -> tuple[TableConfig, ...]:
        default = {"conflict": info.data.get("conflict")}
        return tuple(t if t.conflict else t.model_copy(update=default) for t in tables)

    @model_validator(mode="after")
    def _check_contradictions(self) -> "Config":
        for place, problem, remedy in _contradictions(self, self.nodes, self.tables, _names(self)):
            raise _wrong(f"{_spell(place)}: {problem}", remedy)
        return self

    @property
    def first(self) -> NodeConfig:
        """The node listed first, which wins ties."""
        return self.nodes[0]

    @property
    def second(self) -> NodeConfig:
        """The other one."""
        return self.nodes[1]

    @property
    def directions(self) -> tuple[tuple[NodeConfig, NodeConfig], tuple[NodeConfig, NodeConfig]]:
        """Source and target of both directions, the first node's changes first."""
        return ((self.first, self.second), (self.second, self.first))

    def node(self, name: str) -> NodeConfig:
        """The node of that name; `ConfigurationError` if there is none."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise self._unknown("node", name, _names(self))

    def other(self, name: str) -> NodeConfig:
        """The node that is not `name`; `ConfigurationError` if `name` is none of the two."""
        return self.second if self.node(name) is self.first else self.first

    def table(self, name: str) -> TableConfig:
        """The table of that name; `ConfigurationError` if there is none."""
        for table in self.tables:
            if table.name == name:
                return table
        raise self._unknown("table", name, [table.name for table in self.tables])

    def _unknown(self, kind: str, name: str, known: Sequence[str]) -> ConfigurationError:
        file = str(self.path) if self.path is not None else None
        remedy = f"expected one of {', '.join(known)}"
        close = difflib.get_close_matches(name, known, n=1)
        if close:
            remedy = f"did you mean `{close[0]}`? {remedy}"
        return ConfigurationError(f"has no {kind} `{name}`", file=file, remedy=remedy)


def _names(config: Config) -> tuple[str, ...]:
    return tuple(node.name for node in config.nodes)


# ---- what single values cannot know -----------------------------------------------------------

Contradiction = tuple[Place, str, str]


def _contradictions(
    options: _Options | None,
    nodes: Sequence[NodeConfig | None],
    tables: Sequence[TableConfig | None],
    names: Sequence[str],
) -> Iterator[Contradiction]:
    """Yield what contradicts itself; `None` stands for a part that is unreadable, `names` may be empty.

    Messages name places and keys only, never values: those may come from the environment.
    """
    first, second = (*nodes, None, None)[:2]
    if first and second:
        if first.name == second.name:
            yield ("nodes",), "both nodes have the same name", "call one something else"
        if _location(first) == _location(second):
            yield (
                ("nodes", second.name, "dsn"),
                f"leads to the same database as {first.name}",
                "give each node a database of its own",
            )
    if options and names:
        yield from _policy_contradictions(("conflict",), options.conflict, names)
    seen: dict[Hashable, int] = {}
    for index, table in enumerate(tables):
        if table is None:
            continue
        place = ("tables", index)
        same = seen.setdefault(table.name, index)
        if same != index:
            yield (*place, "name"), f"tables[{same}] has the same name", "remove one of the two"
            continue
        yield from _field_contradictions(place, table)
        if names:
            yield from _node_contradictions(place, table, names)
        for node in names:
            where = (*place, node) if node in table.sides else (*place, "name")
            same = seen.setdefault((node, table.relation(node)), index)
            if same != index:
                yield (
                    where,
                    f"is the same table on {node} as tables[{same}]",
                    "remove one of the two",
                )
            if options and table.relation(node)[0] == options.schema_name:
                yield (
                    where,
                    "lies in the schema of the pipeline's own objects",
                    "sync tables of the application only, or choose another `schema`",
                )


def _location(node: NodeConfig) -> list[object]:
    parts = conninfo_to_dict(node.dsn.get_secret_value())
    parts.setdefault("dbname", parts.get("user"))
    parts.setdefault("port", "5432")
    return [
        parts.get(key) for key in ("host", "hostaddr", "port", "dbname", "service", "servicefile")
    ]


def _policy_contradictions(
    place: Place, policy: str | None, names: Sequence[str]
) -> Iterator[Contradiction]:
    allowed = (*POLICIES, *names)
    if policy is not None and policy not in allowed:
        yield place, "unknown policy", f"expected one of {', '.join(allowed)}"


def _node_contradictions(
    place: Place, table: TableConfig, names: Sequence[str]
) -> Iterator[Contradiction]:
    yield from _policy_contradictions((*place, "conflict"), table.conflict, names)
    nodes = f"expected one of {', '.join(names)}"
    for node in table.sides:
        if node not in names:
            yield (*place, node), "unknown node", nodes
    if table.source is not None and table.source not in names:
        yield (*place, "source"), "unknown node", nodes
        return
    for node in table.conditions:
        if node not in names:
            yield (*place, "where", node), "unknown node", nodes
        elif not table.sends(node):
            yield (
                (*place, "where", node),
                f"has no effect: `source` says that {node} sends nothing of this table",
                "remove one of the two",
            )


def _field_contradictions(place: Place, table: TableConfig) -> Iterator[Contradiction]:
    key = table.key or ()
    for option, fields in (("key", key), ("exclude", table.exclude)):
        for index, field in enumerate(fields):
            if field in fields[:index]:
                yield (*place, option, index), "is listed twice", "remove one"
    for index, field in enumerate(table.exclude):
        if field in key:
            yield (
                (*place, "exclude", index),
                "is a field of the key, which must be synced",
                "remove it from `exclude` or from `key`",
            )
    mapped = [field for side in table.sides.values() for field in side.columns]
    for node, side in table.sides.items():
        fields_of: dict[str, str] = {}
        for field in dict.fromkeys((*side.columns, *mapped, *key, *table.exclude)):
            other = fields_of.setdefault(table.column(node, field), field)
            if other != field:
                yield (
                    (*place, node, "columns", field if field in side.columns else other),
                    "is the column of another field as well",
                    f"give each field a column of its own on {node}",
                )


# ---- reading the file -------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML in which every scalar is its text: `no`, `on`, `007` and dates can be names as they are."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


_NULL, _MERGE = "tag:yaml.org,2002:null", "tag:yaml.org,2002:merge"
_Loader.add_implicit_resolver(_NULL, re.compile(r"^(?:~|null|)$"), ["~", "n", ""])
_Loader.add_implicit_resolver(_MERGE, re.compile(r"^<<$"), ["<"])
_SCALARS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "timestamp")}

_VARIABLE = re.compile(r"(\$\$\{)|\$\{([^}]*)(\}?)")
_SHOWABLE = re.compile(r"[\w.$-]{1,63}")
# The parser quotes what it met, which may be part of a password: only its token names may stay.
_PARSER_QUOTE = re.compile(r"\s*'[^']*'")
_PARSER_TOKEN = re.compile(r"\s*'(?:<[a-z ]+>|.)'")


class _Reading:
    """One file on its way to a `Config`, gathering problems instead of stopping at the first."""

    def __init__(self, text: str, environ: Mapping[str, str], file: str) -> None:
        self.file = file
        self.environ = environ
        self.problems: dict[Place, Problem] = {}
        self.marks: dict[Place, int] = {}
        self.written: dict[Place, object] = {}
        root = self._compose(text)
        try:
            self.document = self._value(root, (), ())
        except RecursionError:
            self.document = {}
            self.report((), "is nested too deeply", "see sync.example.yaml")

    def report(self, place: Place, problem: str, remedy: str | None = None) -> None:
        """Note a problem, unless that place already has one: what follows from it is no news."""
        known = place
        while known and known not in self.marks:
            known = known[:-1]
        line = self.marks.get(known)
        self.problems.setdefault(
            place, Problem(problem, self.file, line, None, _spell(place), remedy)
        )

    def sorted_problems(self) -> list[Problem]:
        return sorted(self.problems.values(), key=lambda problem: problem.line or 0)

    # -- YAML to plain values

    def _compose(self, text: str) -> yaml.Node | None:
        line = column = None
        remedy = "check brackets, quotes and indentation"
        try:
            return yaml.compose(text, Loader=_Loader)
        except yaml.MarkedYAMLError as error:
            problem = _without_quotes(error.problem or error.context or "cannot be read")
            if problem.startswith("but ") and error.context:
                problem = f"{_without_quotes(error.context)}, {problem}"
            mark = error.problem_mark or error.context_mark
            if mark is not None:
                line, column = mark.line + 1, mark.column + 1
                if "${" in "".join(text.splitlines()[mark.line : mark.line + 1]):
                    remedy = 'inside {…} and […], write variables in quotes: {dsn: "${NAME}"}'
        except yaml.reader.ReaderError as error:
            problem = f"contains the control character #x{error.character:04x}"
            line = text.count("\n", 0, error.position) + 1
            remedy = "remove it"
        except RecursionError:
            problem, remedy = "is nested too deeply", "see sync.example.yaml"
        except (yaml.YAMLError, ValueError):
            problem = "cannot be read"
        raise ConfigurationError(
            f"is no valid YAML: {problem}", file=self.file, line=line, column=column, remedy=remedy
        )

    def _value(self, node: yaml.Node | None, place: Place, parents: tuple[yaml.Node, ...]) -> Any:
        if node is None:
            return None
        self.marks.setdefault(place, node.start_mark.line + 1)
        if len(self.marks) > DOCUMENT_VALUES:
            raise ConfigurationError(
                f"holds more than {DOCUMENT_VALUES} values",
                file=self.file,
                remedy="use fewer aliases",
            )
        value: Any = None
        if node in parents:
            self.report(place, "contains itself", "remove the alias")
        elif isinstance(node, yaml.MappingNode):
            value = {}
            for key, value_node, line in self._entries(node, place, {node}):
                self.marks[(*place, key)] = line
                value[key] = self._value(value_node, (*place, key), (*parents, node))
        elif isinstance(node, yaml.SequenceNode):
            value = [
                self._value(item, (*place, index), (*parents, node))
                for index, item in enumerate(node.value)
            ]
        elif node.tag in _SCALARS:
            value = self._text(str(node.value), place)
        elif node.tag not in (_NULL, _MERGE):
            self.report(place, "has a YAML tag (`!…`) that means nothing here", "remove the tag")
        if not isinstance(node, yaml.ScalarNode):
            self.written[place] = value
        return value

    def _entries(
        self, node: yaml.MappingNode, place: Place, visited: set[yaml.Node]
    ) -> Iterator[tuple[str, yaml.Node, int]]:
        """Yield key, value and line of a mapping: its own entries, then those that `<<` adds."""
        lines: dict[str, int] = {}
        merged: list[yaml.Node] = []
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = key_node.value
            if key_node.tag == _MERGE:
                merged += (
                    value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                )
            elif not isinstance(key_node, yaml.ScalarNode) or key_node.tag not in _SCALARS:
                self.report(place, f"has a key that is no text in line {line}", "write a name")
            elif not _storable(key):
                self.report(place, f"has a key with a NUL or half a character in line {line}")
            elif key in lines:
                self.marks[(*place, key)] = line
                self.report((*place, key), f"is set again; first in line {lines[key]}", "keep one")
            else:
                lines[key] = line
                yield key, value_node, line
        for source in merged:
            if not isinstance(source, yaml.MappingNode):
                self.report(place, "`<<` takes another mapping", "give it the alias of one")
            elif source not in visited:
                visited.add(source)
                for key, value_node, line in self._entries(source, place, visited):
                    if key not in lines:
                        lines[key] = line
                        yield key, value_node, line

    def _text(self, text: str, place: Place) -> str:
        self.written[place] = text

        def value_of(match: re.Match[str]) -> str:
            escaped, name, closed = match.groups()
            if escaped:
                return "${"
            if not closed or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                self.report(
                    place,
                    "contains `${` without the name of a variable and `}`",
                    "write ${NAME}, or $${ for the characters themselves",
                )
            elif name not in self.environ:
                self.report(
                    place,
                    f"the environment variable {name} is not set",
                    f"set {name}, or write the value here",
                )
            else:
                return self.environ[name]
            return ""

        value = _VARIABLE.sub(value_of, text)
        if not _storable(value):
            self.report(place, "contains a NUL or half a character", "write valid UTF-8")
        return value

    # -- plain values to models

    def config(self, path: Path | None) -> Config | None:
        """Build the configuration, or None if there are problems."""
        document = self.document
        if document is None:
            self.report((), "is empty", "start from sync.example.yaml")
        elif self._is_mapping((), document, "a mapping with `nodes` and `tables`"):
            options = self._options(document)
            names, nodes = self._nodes(document.get("nodes"))
            tables = self._tables(document.get("tables"), names)
            for place, problem, remedy in _contradictions(options, nodes, tables, names):
                written = self.written.get(place)
                shown = f" {_show(written)}" if problem.startswith("unknown") and written else ""
                self.report(place, problem + shown, remedy)
            if options and not self.problems:
                values = {name: getattr(options, name) for name in _Options.model_fields}
                parts = {"nodes": nodes, "tables": tables, "path": path}
                return Config.model_validate(values | parts)
        return None

    def _options(self, document: dict[str, Any]) -> _Options | None:
        known = [field.alias or name for name, field in _Options.model_fields.items()]
        self._check_keys((), document, ["nodes", "tables", *known])
        values = {key: value for key, value in document.items() if key in known}
        if "retry" in values:
            values["retry"] = self._model(RetryConfig, ("retry",), values["retry"]) or RetryConfig()
        return self._model(_Options, (), values)

    def _nodes(self, value: Any) -> tuple[list[str], list[NodeConfig | None]]:
        example = 'exactly two nodes, as in `crm: {dsn: "${CRM_DSN}"}`'
        if not self._is_mapping(("nodes",), value, example):
            return [], []
        if len(value) != 2:
            self.report(
                ("nodes",),
                f"expected exactly two nodes, found {len(value)}",
                "a hub with more uses one file and one `schema` per pair",
            )
        nodes = []
        for name, node in value.items():
            place = ("nodes", name)
            if self._is_mapping(place, node, 'a mapping, as in {dsn: "${CRM_DSN}"}'):
                self._check_keys(place, node, ["dsn"])
                values = {key: item for key, item in node.items() if key == "dsn"}
                nodes.append(self._model(NodeConfig, place, values | {"name": name}))
        return list(value), nodes

    def _tables(self, value: Any, names: list[str]) -> list[TableConfig | None]:
        if not isinstance(value, list) or not value:
            self.report(
                ("tables",), f"expected a list of tables, found {_show(value)}", "list at least one"
            )
            return []
        return [self._table(("tables", index), item, names) for index, item in enumerate(value)]

    def _table(self, place: Place, value: Any, names: list[str]) -> TableConfig | None:
        if isinstance(value, str):
            value = {"name": value}
            self.written[(*place, "name")] = self.written[place]
            if place in self.problems:
                return None
        if not self._is_mapping(place, value, "the name of a table, or a mapping with `name`"):
            return None
        if names:
            self._check_keys(place, value, [*TABLE_OPTIONS, *names])
        values = {key: item for key, item in value.items() if key in TABLE_OPTIONS}
        values["sides"] = {
            node: self._model(SideConfig, (*place, node), value[node]) or SideConfig()
            for node in names
            if node in value and node not in TABLE_OPTIONS
        }
        return self._model(TableConfig, place, values)

    def _model(self, model: type[M], place: Place, value: Any) -> M | None:
        known = {field.alias or name: field for name, field in model.model_fields.items()}
        if not self._is_mapping(place, value, f"a mapping of {', '.join(known)}"):
            return None
        if model in (RetryConfig, SideConfig):
            self._check_keys(place, value, list(known))
            value = {key: item for key, item in value.items() if key in known}
        try:
            return model.model_validate(value)
        except ValidationError as invalid:
            # The errors alone: their inputs may be secrets.
            errors = invalid.errors(include_url=False, include_input=False)
        for error in errors:
            loc: Place = tuple(part for part in error["loc"] if part != "[key]")
            at = place if model is NodeConfig and loc == ("name",) else (*place, *loc)
            if any(known_place[: len(at)] == at for known_place in self.problems):
                continue
            if error["type"] == "problem":
                self.report(at, error["ctx"]["problem"], error["ctx"]["remedy"])
                continue
            expected = known[str(loc[0])].description or "a value"
            if error["type"] == "missing":
                meant = f"did you mean `{loc[0]}`?"
                beside = [p for other, p in self.problems.items() if other[:-1] == at[:-1]]
                if all(problem.remedy != meant for problem in beside):
                    self.report(at, "is missing", f"add {expected}")
            else:
                found = _show(self.written.get(at), secret=at[-1] == "dsn")
                self.report(at, f"expected {expected}, found {found}")
        # What remains is read again, so that its contradictions are reported in the same run.
        wrong = {str(error["loc"][0]) for error in errors if error["loc"]} or set(value)
        rest = {key: item for key, item in value.items() if key not in wrong}
        return self._model(model, place, rest) if len(rest) < len(value) else None

    def _is_mapping(self, place: Place, value: Any, expected: str) -> bool:
        if isinstance(value, dict):
            return True
        self.report(place, f"expected {expected}, found {_show(value, secret=True)}")
        return False

    def _check_keys(self, place: Place, value: dict[str, Any], known: Sequence[str]) -> None:
        for key in value:
            if key not in known:
                self.report((*place, key), "unknown key", _suggest(key, known))


def _suggest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean `{close[0]}`?" if close else f"expected one of {', '.join(known)}"


def _show(value: object, *, secret: bool = False) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    text = str(value)
    variable = re.fullmatch(r"\$\{\w+\}", text)
    return f"`{text}`" if not secret and (variable or _SHOWABLE.fullmatch(text)) else "a text"


def _without_quotes(message: str) -> str:
    return _PARSER_QUOTE.sub(
        lambda quote: quote[0] if _PARSER_TOKEN.fullmatch(quote[0]) else "", message
    )


def _spell(place: Place) -> str | None:
    """Spell `("tables", 1, "key")` as `tables[1].key`; a key that is no name may be a secret."""
    spelled = ""
    for part in place:
        if isinstance(part, int):
            spelled += f"[{part}]"
        else:
            spelled += "." + (part if _SHOWABLE.fullmatch(part) else "(not a name)")
    return spelled.removeprefix(".") or None


def _storable(text: str) -> bool:
    """Whether PostgreSQL can hold the text: no NUL, no half of a surrogate pair."""
    return not re.search("[\0\ud800-\udfff]", text)
