"""A configuration as frozen values: two nodes, the tables they share, and how the pipeline behaves."""

import difflib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

from psycopg.conninfo import conninfo_to_dict
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    WrapSerializer,
    field_validator,
    model_validator,
)

from sync_pipeline import config_checks as checks
from sync_pipeline.config_checks import POLICIES, Place, spell, wrong
from sync_pipeline.errors import ConfigurationError

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


def _as_dict(value: Mapping[str, Any], handler: Any) -> Any:
    return handler(dict(value))


Identifier = Annotated[str, AfterValidator(checks.identifier)]
_FROZEN = (AfterValidator(FrozenMap), WrapSerializer(_as_dict))
IdentifierMap = Annotated[Mapping[str, Identifier], *_FROZEN]
ConditionMap = Annotated[Mapping[str, Annotated[str, AfterValidator(checks.condition)]], *_FROZEN]


class Model(BaseModel):
    """A frozen part of a configuration. No error shows what was given."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
        validate_by_name=True,
        validate_by_alias=True,
        allow_inf_nan=False,
    )


class NodeConfig(Model):
    """One of the two databases. Its connection string shows in no `repr` and no message."""

    name: Annotated[str, AfterValidator(checks.node_name)]
    dsn: Annotated[SecretStr, AfterValidator(checks.conninfo)] = Field(
        description="a PostgreSQL connection string"
    )


class SideConfig(Model):
    """What a table is called on one node, where that differs."""

    table: Annotated[Relation, BeforeValidator(checks.relation)] | None = Field(
        default=None, description="a table as `table`, `schema.table` or [schema, table]"
    )
    columns: IdentifierMap = Field(
        default=FrozenMap(), description="columns by field, as in {amount: total}"
    )


SideMap = Annotated[Mapping[str, SideConfig], *_FROZEN]


class TableConfig(Model):
    """A table that both nodes have, and how its records travel."""

    name: Annotated[str, AfterValidator(checks.table_name)] = Field(
        description="the name of a table"
    )
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
        """The SQL condition on the rows that `node` sends; not parenthesised. None for a node that sends nothing."""
        return self.conditions.get(node) if self.sends(node) else None


class RetryConfig(Model):
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
            raise wrong("base_seconds is above max_seconds", "lower the one or raise the other")
        return self


class Options(Model):
    """The options of a link, without its nodes and tables."""

    schema_name: Annotated[str, AfterValidator(checks.schema_name)] = Field(
        default="sync", alias="schema", description="the name of a schema"
    )
    batch_size: int = Field(
        default=10_000, ge=1, le=1_000_000, description="a whole number from 1 to 1000000"
    )
    poll_seconds: float = Field(
        default=0.15, gt=0, le=3600, description="seconds above 0, at most 3600"
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
            raise wrong("is below a millisecond", "write 0 for none, or at least 0.001")
        return seconds


class Config(Options):
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
        for place, problem, remedy in contradictions(self, self.nodes, self.tables, _names(self)):
            raise wrong(f"{spell(place)}: {problem}", remedy)
        return self

    @property
    def file(self) -> str:
        """What messages call the file."""
        return str(self.path) if self.path is not None else "the configuration"

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


def contradictions(
    options: Options | None,
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
            yield (*place, "where", node), "is no node", nodes


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
