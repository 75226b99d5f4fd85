"""`sync.yaml` on its way to a `Config`: YAML to plain values, those to models, and every problem with its place.

No message repeats a value that came from the environment or stands where a connection string belongs.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from sync_pipeline.config_checks import SHOWABLE, TABLE_OPTIONS, Place, spell, storable
from sync_pipeline.config_values import (
    Config,
    Model,
    NodeConfig,
    Options,
    RetryConfig,
    SideConfig,
    TableConfig,
    contradictions,
)
from sync_pipeline.errors import ConfigurationError, Problem

DOCUMENT_VALUES = 100_000  # Aliases of aliases make a small file explode; no real one comes near.

M = TypeVar("M", bound=Model)


class _Loader(yaml.SafeLoader):
    """YAML in which every scalar is its text: `no`, `on`, `007` and dates can be names as they are."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


_NULL, _MERGE = "tag:yaml.org,2002:null", "tag:yaml.org,2002:merge"
_Loader.add_implicit_resolver(_NULL, re.compile(r"^(?:~|null|)$"), ["~", "n", ""])
_Loader.add_implicit_resolver(_MERGE, re.compile(r"^<<$"), ["<"])
_SCALARS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "timestamp")}

_VARIABLE = re.compile(r"(\$\$\{)|\$\{([^}]*)(\}?)")
_VARIABLE_ALONE = re.compile(r"\$\{\w+\}")
# The parser quotes what it met, which may be part of a password: only its token names may stay.
_PARSER_QUOTE = re.compile(r"\s*'[^']*'")
_PARSER_TOKEN = re.compile(r"\s*'(?:<[a-z ]+>|.)'")


class Reading:
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
            place, Problem(problem, self.file, line, None, spell(place), remedy)
        )

    def sorted_problems(self) -> list[Problem]:
        """All problems in the order of the file."""
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
            elif not storable(key):
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
        if not storable(value):
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
            for place, problem, remedy in contradictions(options, nodes, tables, names):
                written = self.written.get(place)
                shown = f" {_show(written)}" if problem.startswith("unknown") and written else ""
                self.report(place, problem + shown, remedy)
            if options and not self.problems:
                values = {name: getattr(options, name) for name in Options.model_fields}
                parts = {"nodes": nodes, "tables": tables, "path": path}
                return Config.model_validate(values | parts)
        return None

    def _options(self, document: dict[str, Any]) -> Options | None:
        known = [field.alias or name for name, field in Options.model_fields.items()]
        self._check_keys((), document, ["nodes", "tables", *known])
        values = {key: value for key, value in document.items() if key in known}
        if "retry" in values:
            values["retry"] = self._model(RetryConfig, ("retry",), values["retry"]) or RetryConfig()
        return self._model(Options, (), values)

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
                problem = f"{error['ctx']['problem']}{self._origin(at)}"
                self.report(at, problem, error["ctx"]["remedy"])
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

    def _origin(self, place: Place) -> str:
        """Return which variable a value came from: what is wrong is there, not in the file."""
        written = str(self.written.get(place))
        return f" (from {written})" if _VARIABLE_ALONE.fullmatch(written) else ""

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
    variable = _VARIABLE_ALONE.fullmatch(text)
    return f"`{text}`" if not secret and (variable or SHOWABLE.fullmatch(text)) else "a text"


def _without_quotes(message: str) -> str:
    return _PARSER_QUOTE.sub(
        lambda quote: quote[0] if _PARSER_TOKEN.fullmatch(quote[0]) else "", message
    )
