"""A configuration is read whole or refused with every reason at once, and never tells a secret."""

import copy
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from sync_pipeline.config import (
    POLICIES,
    TABLE_OPTIONS,
    Config,
    NodeConfig,
    RetryConfig,
    TableConfig,
    load,
    parse,
)
from sync_pipeline.errors import (
    CatalogMismatch,
    ConfigurationError,
    ConnectionFailed,
    LockTaken,
    NotInstalled,
    PassInterrupted,
    PoolerRefused,
    SyncPipelineError,
)

SECRET = "hunter2-S3cr3t"
ENVIRON = {
    "CRM_DSN": f"postgresql://app:{SECRET}@crm.example:5432/crm",
    "BILLING_DSN": f"host=billing.example dbname=billing user=app password={SECRET}",
    "BROKEN_DSN": f"host=billing.example {SECRET}",
    "TEN": "10",
    "POLICY": SECRET,
    "EMPTY": "",
}
NODES = 'nodes: {crm: {dsn: "${CRM_DSN}"}, billing: {dsn: "${BILLING_DSN}"}}\n'
ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "sync.example.yaml"
DOCUMENTATION = ROOT / "docs" / "configuration.md"

INVOICES = """
tables:
  - accounts
  - name: invoices
    crm:     {table: sales.invoices, columns: {amount: total}}
    billing: {table: [billing, in.voice]}
    key: [id]
    exclude: [internal_note]
    source: billing
    conflict: crm
    where: {billing: "state <> 'a;b--c'"}
"""


def read(text: str, environ: Mapping[str, str] = ENVIRON) -> Config:
    return parse(text, environ)


def tables(text: str) -> Config:
    return read(f"{NODES}tables: [{text}]")


def refusal(text: str, environ: Mapping[str, str] = ENVIRON) -> str:
    with pytest.raises(ConfigurationError) as caught:
        read(text, environ)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    return str(caught.value)


# ---- what is read


def test_the_short_form_has_the_defaults_of_the_long_form() -> None:
    config = read(NODES + "tables: [users, {name: accounts}]")
    assert config.tables[0] == config.tables[1].model_copy(update={"name": "users"})
    users = config.table("users")
    assert users.relation("crm") == (None, "users")
    assert users.column("crm", "id") == "id"
    assert users.key is None
    assert users.exclude == ()
    assert users.sends("crm")
    assert users.sends("billing")
    assert users.where("crm") is None
    assert users.policy == "last_update_wins"


def test_the_long_form_says_everything_about_a_table() -> None:
    invoices = read(NODES + INVOICES).table("invoices")
    assert invoices.relation("crm") == ("sales", "invoices")
    assert invoices.relation("billing") == ("billing", "in.voice")
    assert invoices.column("crm", "amount") == "total"
    assert invoices.column("billing", "amount") == "amount"
    assert invoices.key == ("id",)
    assert invoices.exclude == ("internal_note",)
    assert invoices.sends("billing")
    assert not invoices.sends("crm")
    assert invoices.policy == "crm"
    assert invoices.where("billing") == "state <> 'a;b--c'"
    assert invoices.where("crm") is None


def test_a_condition_of_the_node_that_only_receives_a_table_does_nothing() -> None:
    config = tables("{name: invoices, source: billing, where: {crm: \"state <> 'draft'\"}}")
    assert config.table("invoices").where("crm") is None


def test_a_dot_in_the_name_separates_the_schema_when_a_node_says_no_more() -> None:
    assert tables("sales.invoices").tables[0].relation("crm") == ("sales", "invoices")


def test_the_nodes_keep_their_order_and_know_each_other() -> None:
    config = tables("users")
    assert (config.first.name, config.second.name) == ("crm", "billing")
    assert config.nodes == (config.first, config.second)
    assert config.directions == ((config.first, config.second), (config.second, config.first))
    assert config.node("billing") is config.second
    assert config.other("billing") is config.first
    assert config.other("crm") is config.second


def test_an_unknown_node_or_table_is_answered_with_the_nearest_known_one() -> None:
    config = tables("users")
    with pytest.raises(ConfigurationError, match=r"no node `biling`; did you mean `billing`\?"):
        config.other("biling")
    with pytest.raises(ConfigurationError, match=r"no table `user`; did you mean `users`\?"):
        config.table("user")


def test_every_option_has_the_documented_default() -> None:
    config = tables("users")
    assert config.schema_name == "sync"
    assert config.batch_size == 10_000
    assert config.poll_seconds == 0.15
    assert (config.retry.max_attempts, config.retry.base_seconds, config.retry.max_seconds) == (
        10,
        2.0,
        3600.0,
    )
    assert config.conflict == "last_update_wins"
    assert config.conflict_retention_days == 30
    assert config.lock_timeout_seconds == 10
    assert config.statement_timeout_seconds == 0
    assert config.clock_warning_seconds == 5
    assert config.sequences == "leave"
    assert config.path is None


def test_the_example_says_the_defaults() -> None:
    example_config = load(EXAMPLE, ENVIRON)
    default = tables("users")
    for option in type(default).model_fields.keys() - {"nodes", "tables", "path"}:
        assert getattr(example_config, option) == getattr(default, option), option
    assert [table.name for table in example_config.tables] == ["accounts", "users", "invoices"]


def test_a_policy_for_all_tables_gives_way_to_the_policy_of_one() -> None:
    config = read(NODES + "conflict: billing\ntables: [users, {name: a, conflict: hold}]")
    assert [table.policy for table in config.tables] == ["billing", "hold"]


@pytest.mark.parametrize("name", ["no", "on", "y", "true", "2024", "007", "2024-01-01", "1:30"])
def test_a_name_is_its_text_whatever_yaml_takes_it_for(name: str) -> None:
    assert tables(f'"{name}"').tables[0].name == name
    assert read(f"{NODES}tables:\n  - {name}").tables[0].name == name


def test_a_variable_is_read_in_any_value_and_a_doubled_dollar_is_a_dollar() -> None:
    config = read(
        NODES + "batch_size: ${TEN}\ntables: [{name: a, where: {crm: \"x = '$${TEN}'\"}}]"
    )
    assert config.batch_size == 10
    assert config.table("a").where("crm") == "x = '${TEN}'"


def test_a_value_of_the_environment_is_not_read_again() -> None:
    environ = {**ENVIRON, "OUTER": "${TEN}"}
    config = read(NODES + "tables: [{name: a, where: {crm: \"x = '${OUTER}'\"}}]", environ)
    assert config.table("a").where("crm") == "x = '${TEN}'"


def test_a_mapping_can_be_merged_from_an_alias() -> None:
    config = read(NODES + "tables: [&a {name: a, exclude: [x]}, {<<: *a, name: b}]")
    assert [(table.name, table.exclude) for table in config.tables] == [
        ("a", ("x",)),
        ("b", ("x",)),
    ]


def test_a_configuration_cannot_change_and_can_be_hashed_copied_and_pickled() -> None:
    config = read(NODES + INVOICES)
    assert hash(config) == hash(read(NODES + INVOICES))
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config  # noqa: S301
    with pytest.raises(ValidationError):
        config.batch_size = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        config.table("invoices").sides["crm"] = None  # type: ignore[index]


def test_no_form_of_a_configuration_shows_a_password() -> None:
    config = read(NODES + INVOICES)
    assert SECRET in config.first.dsn.get_secret_value()
    for shown in (repr(config), str(config), config.model_dump_json(), f"{config.first}"):
        assert SECRET not in shown


def test_a_configuration_built_in_code_is_checked_too() -> None:
    nodes = [{"name": "crm", "dsn": "host=a"}, {"name": "billing", "dsn": "host=b"}]
    Config.model_validate({"nodes": nodes, "tables": [{"name": "users"}]})
    with pytest.raises(ValidationError, match=r"tables\[0\].source: unknown node"):
        Config.model_validate({"nodes": nodes, "tables": [{"name": "users", "source": "x"}]})
    with pytest.raises(ValidationError) as caught:
        NodeConfig.model_validate({"name": "crm", "dsn": SECRET})
    assert SECRET not in str(caught.value)
    assert TableConfig(name="users").policy == "last_update_wins"


# ---- where it is read


def test_the_path_is_the_argument_then_the_variable_then_sync_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("sync.yaml", "variable.yaml", "argument.yaml"):
        (tmp_path / name).write_text(NODES + f"tables: [from.{name.removesuffix('.yaml')}]")
    variable = {**ENVIRON, "SYNC_CONFIG": "variable.yaml"}
    assert load(None, ENVIRON).tables[0].name == "from.sync"
    assert load(None, {**ENVIRON, "SYNC_CONFIG": ""}).tables[0].name == "from.sync"
    assert load(None, variable).tables[0].name == "from.variable"
    config = load(tmp_path / "argument.yaml", variable)
    assert config.tables[0].name == "from.argument"
    assert config.path == tmp_path / "argument.yaml"


def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "sync.yaml").write_text(NODES + "tables: [a]", encoding="utf-8-sig")
    assert load(tmp_path / "sync.yaml", ENVIRON).tables[0].name == "a"


def test_a_file_that_cannot_be_read_is_named_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe4")
    for name, expected in {
        "none.yaml": "does not exist; copy sync.example.yaml there",
        ".": "cannot be read: Is a directory",
        "latin.yaml": "is not UTF-8 at byte 3",
        "a\0b": "is not a path",
    }.items():
        with pytest.raises(ConfigurationError) as caught:
            load(f"{tmp_path}/{name}", ENVIRON)
        assert expected in str(caught.value)
        assert str(caught.value).startswith(str(Path(f"{tmp_path}/{name}")))


# ---- what is refused


def test_a_problem_names_file_line_place_and_remedy_in_one_line() -> None:
    text = f"{NODES}tables:\n  - users\n  - name: invoices\n    conflict: latest\n"
    with pytest.raises(ConfigurationError) as caught:
        parse(text, ENVIRON, file="/etc/sync.yaml")
    assert str(caught.value) == (
        "/etc/sync.yaml:5: tables[1].conflict: unknown policy `latest`; "
        "expected one of last_update_wins, hold, crm, billing"
    )
    [problem] = caught.value.problems
    assert (problem.file, problem.line) == ("/etc/sync.yaml", 5)
    assert problem.place == "tables[1].conflict"
    assert caught.value.exit_code == 1


def test_all_problems_of_a_file_are_reported_at_once_in_their_order() -> None:
    text = """\
nodes:
  crm: {dsn: "${NO_DSN}"}
  billing: {dsn: "${BROKEN_DSN}"}
batch_size: 0
tables:
  - name: users
    where: {crm: "a; b"}
    conflict: x
  - name: users
  - {name: c, source: d}
"""
    with pytest.raises(ConfigurationError) as caught:
        read(text)
    assert [(problem.line, problem.place) for problem in caught.value.problems] == [
        (2, "nodes.crm.dsn"),
        (3, "nodes.billing.dsn"),
        (4, "batch_size"),
        (7, "tables[0].where.crm"),
        (8, "tables[0].conflict"),
        (9, "tables[1].name"),
        (10, "tables[2].source"),
    ]
    assert str(caught.value).count("\n") == 6


def test_the_documentation_shows_real_messages_and_every_option() -> None:
    page = DOCUMENTATION.read_text()
    examples = re.findall(r"```yaml\n# (\S+)\n(.*?)```\n+```text\n(.*?)```", page, re.DOTALL)
    assert len(examples) >= 2
    for file, text, message in examples:
        with pytest.raises(ConfigurationError) as caught:
            parse(f"# {file}\n{text}", {}, file=file)
        assert str(caught.value) == message.strip()
    options = [
        field.alias or name
        for name, field in Config.model_fields.items()
        if name not in {"path", "retry"}
    ]
    for option in [*options, *RetryConfig.model_fields, *TABLE_OPTIONS]:
        assert f"`{option}`" in page or f"`retry.{option}`" in page, option


LONG = "x" * 64

REFUSED = {
    # the document
    "": "is empty",
    "- a": "expected a mapping with `nodes` and `tables`, found a list",
    "a: [": "sync.yaml:1:5: is no valid YAML",
    "a: {b: ${X}}": "write variables in quotes",
    "a\n---\nb": "sync.yaml:2:1: is no valid YAML: expected a single document",
    "a: \x07": "sync.yaml:1: is no valid YAML: contains the control character #x0007",
    "[" * 5000: "is nested too deeply",
    "a: 1\na: 2": "sync.yaml:2: a: is set again; first in line 1",
    "? [a]\n: b": "has a key that is no text",
    "a: &a [*a]": "a[0]: contains itself",
    "<<: 1": "`<<` takes another mapping",
    "a: !!python/name:os.system x": "has a YAML tag",
    'a: "\\0"': "contains a NUL",
    'a: "\\ud800"': "half a character",
    '"\\0": a': "a key with a NUL",
    "a: ${MISSING}": "the environment variable MISSING is not set; set MISSING",
    "a: ${1,2}": "contains `${` without the name of a variable",
    "a: ${TEN": "contains `${` without the name of a variable",
    # options
    NODES + "batch_sise: 1\ntables: [a]": "batch_sise: unknown key; did you mean `batch_size`?",
    NODES + "path: x\ntables: [a]": "path: unknown key; expected one of nodes, tables, schema",
    NODES + "batch_size: 1000001\ntables: [a]": "from 1 to 1000000, found `1000001`",
    NODES + "batch_size: true\ntables: [a]": "from 1 to 1000000, found `true`",
    NODES + "batch_size: 1.5\ntables: [a]": "from 1 to 1000000, found `1.5`",
    NODES + "batch_size: ${POLICY}\ntables: [a]": "from 1 to 1000000, found `${POLICY}`",
    NODES + "poll_seconds: 0\ntables: [a]": "seconds above 0, at most 3600",
    NODES + "poll_seconds: nan\ntables: [a]": "seconds above 0, at most 3600",
    NODES + "lock_timeout_seconds: 0\ntables: [a]": "seconds from 0.001",
    NODES + "statement_timeout_seconds: 0.0001\ntables: [a]": "is below a millisecond",
    NODES + "statement_timeout_seconds: -1\ntables: [a]": "or 0 for none",
    NODES + "conflict_retention_days: 0\ntables: [a]": "number of days from 1",
    NODES + "retry: 3\ntables: [a]": "retry: expected a mapping of max_attempts",
    NODES + "retry: {attempts: 3}\ntables: [a]": "did you mean `max_attempts`?",
    NODES + "retry: {base_seconds: 9, max_seconds: 1}\ntables: [a]": "above max_seconds",
    NODES + "conflict: newest\ntables: [a]": "conflict: unknown policy `newest`",
    NODES + "conflict: ${POLICY}\ntables: [a]": "conflict: unknown policy `${POLICY}`",
    NODES + "schema: pg_sync\ntables: [a]": "starts with `pg_`",
    NODES + "schema: public\ntables: [a]": "belongs to the pipeline alone",
    NODES + "schema: 'a\"b'\ntables: [a]": "is not letters, digits and underscores",
    NODES + f"schema: {LONG}\ntables: [a]": "schema: is longer than 63 bytes",
    # nodes
    "tables: [a]": "nodes: expected exactly two nodes",
    "nodes: {crm: {dsn: host=a}}\ntables: [a]": "expected exactly two nodes, found 1",
    "nodes: {a: {dsn: host=a}, b: {dsn: host=b}, c: {dsn: host=c}}\ntables: [a]": "found 3",
    "nodes: {crm: {dsn: host=a}, CRM: {dsn: host=b}}\ntables: [a]": "nodes.CRM: is no node name",
    "nodes: {crm: {dsn: host=a}, hold: {dsn: host=b}}\ntables: [a]": "policy's own name",
    "nodes: {crm: {dsn: host=a}, where: {dsn: host=b}}\ntables: [a]": "policy's own name",
    "nodes: {crm: {}, b: {dsn: host=b}}\ntables: [a]": "nodes.crm.dsn: is missing",
    'nodes: {crm: {dsn: "${EMPTY}"}, b: {dsn: host=b}}\ntables: [a]': "nodes.crm.dsn: is empty (from ${EMPTY})",
    "nodes: {crm: {dns: host=a}, b: {dsn: host=b}}\ntables: [a]": "did you mean `dsn`?",
    "nodes: {crm: host=a, b: {dsn: host=b}}\ntables: [a]": "nodes.crm: expected a mapping",
    "nodes: {crm: {dsn: host=a}, b: {dsn: host=a port=5432}}\ntables: [a]": "same database as crm",
    'nodes: {crm: {dsn: "mysql://h/d"}, b: {dsn: host=b}}\ntables: [a]': "no PostgreSQL connection",
    # tables
    NODES: "tables: expected a list of tables, found nothing",
    NODES + "tables: []": "tables: expected a list of tables, found an empty list",
    NODES + "tables: {a: b}": "tables: expected a list of tables, found a mapping",
    NODES + "tables: [[a]]": "tables[0]: expected the name of a table",
    NODES + "tables: [{key: [a]}]": "tables[0].name: is missing",
    NODES + "tables: ['']": "tables[0].name: is empty",
    NODES + "tables: [a.b.c]": "has more than one dot; write [schema, table]",
    NODES + f"tables: [{LONG}]": "tables[0].name: is longer than 63 bytes",
    NODES + "tables: ['\"Users\"']": "tables[0].name: is in SQL quotes",
    NODES + "tables: [a, b, a]": "tables[2].name: tables[0] has the same name",
    NODES + "tables: [a, {name: b, crm: {table: a}}]": "the same table on crm as tables[0]",
    NODES + "tables: [sync.a]": "lies in the schema of the pipeline's own objects",
    NODES
    + "tables: [{name: a, crn: {table: b}}]": "tables[0].crn: unknown key; did you mean `crm`?",
    NODES + "tables: [{name: a, sides: {}}]": "tables[0].sides: unknown key",
    NODES + "tables: [{name: a, crm: b}]": "tables[0].crm: expected a mapping of table, columns",
    NODES + "tables: [{name: a, crm: {tabel: b}}]": "did you mean `table`?",
    NODES + "tables: [{name: a, crm: {table: [a, b, c]}}]": "`schema.table` or [schema, table]",
    NODES + "tables: [{name: a, crm: {columns: {x: ''}}}]": "tables[0].crm.columns.x: is empty",
    NODES + "tables: [{name: a, key: id}]": "expected a list of at least one field, found `id`",
    NODES + "tables: [{name: a, key: []}]": "expected a list of at least one field, found an empty",
    NODES + "tables: [{name: a, key: [b, b]}]": "tables[0].key[1]: is listed twice",
    NODES + "tables: [{name: a, exclude: [b, b]}]": "tables[0].exclude[1]: is listed twice",
    NODES + "tables: [{name: a, key: [b], exclude: [b]}]": "tables[0].exclude[0]: is a field of",
    NODES + "tables: [{name: a, crm: {columns: {b: x, c: x}}}]": "tables[0].crm.columns.c: is the",
    NODES + "tables: [{name: a, key: [x], crm: {columns: {b: x}}}]": "the column of another field",
    NODES + "tables: [{name: a, source: c}]": "source: unknown node `c`; expected one of crm, bill",
    NODES + "tables: [{name: a, where: {c: b}}]": "tables[0].where.c: is no node; expected one of",
    NODES + "tables: [{name: a, where: b}]": "tables[0].where: expected conditions by node",
}


@pytest.mark.parametrize(("text", "expected"), REFUSED.items(), ids=range(len(REFUSED)))
def test_what_is_wrong_is_refused_with_one_problem_that_says_so(text: str, expected: str) -> None:
    message = refusal(text)
    if "tables: [" in text:
        assert "\n" not in message
    expected = expected.replace("no PostgreSQL connection", "is not a PostgreSQL connection")
    assert expected in message
    assert SECRET not in message


@pytest.mark.parametrize(
    "condition",
    [
        "state <> 'draft'",
        "(a or b) and (c)",
        "note <> 'it''s; -- fine /*'",
        r"note <> E'it\'s; fine'",
        '"odd;name--" = 1',
        "note <> $$a;b$$ and x <> $t$ ' $$ ; $t$",
        "a - -1 > 0 and b / 2 > 0",
        "smile <> ')'",
    ],
)
def test_a_condition_may_hold_anything_inside_of_its_strings(condition: str) -> None:
    where = yaml.safe_dump({"crm": condition}, default_flow_style=True, width=1000).strip()
    assert tables(f"{{name: a, where: {where}}}").tables[0].where("crm") == condition


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("true; drop table users", "contains `;`"),
        ("true -- hidden", "contains the comment `--`"),
        ("true /* hidden */", "contains the comment `/*`"),
        ("name = 'open", "opens a quote"),
        ('"open', "opens a quote"),
        ("$$open", "opens a quote"),
        ("a) or (b", "parentheses"),
        ("(a", "parentheses"),
        (r"name = 'a\'; drop table users; --'", "contains `;`"),
        ("  ", "is empty"),
    ],
)
def test_a_condition_is_one_expression(condition: str, expected: str) -> None:
    where = yaml.safe_dump({"crm": condition}, default_flow_style=True, width=1000).strip()
    assert expected in refusal(f"{NODES}tables: [{{name: a, where: {where}}}]")


@pytest.mark.parametrize(
    "dsn",
    [
        f"postgresql://u:%zz{SECRET}@h/d",
        f"postgresql://u:{SECRET}@h/d?{SECRET}=1",
        f"host=a password=my {SECRET}",
        f"host=a {SECRET}=1",
        f"host=a password='{SECRET}",
        SECRET,
    ],
)
def test_a_dsn_that_cannot_be_read_is_not_shown(dsn: str) -> None:
    environ = {**ENVIRON, "CRM_DSN": dsn}
    for nodes in (NODES, NODES.replace("${CRM_DSN}", dsn)):
        assert SECRET not in refusal(nodes + "tables: [a]", environ)


@pytest.mark.parametrize(
    ("dsn", "expected"),
    [
        ("postgresql://h/d?sslmod=require", "a parameter after `?`"),
        ("host=a pasword=x", "an option that PostgreSQL does not know, or an unquoted space"),
        ("postgresql://u:100%@h/d", "a `%` that begins no %-escape"),
        ("host='a", "opens a quote"),
        ("billing", "is not a PostgreSQL connection string (not shown here)"),
    ],
)
def test_a_dsn_that_cannot_be_read_is_explained_without_its_text(dsn: str, expected: str) -> None:
    assert expected in refusal(NODES + "tables: [a]", {**ENVIRON, "CRM_DSN": dsn})


@pytest.mark.parametrize(
    "nodes",
    [
        f'nodes: {{crm: "{SECRET}", billing: {{dsn: host=b}}}}',
        f"nodes: {SECRET}",
        f'nodes: {{"postgresql://u:{SECRET}@h/d": {{}}, billing: {{dsn: host=b}}}}',
        f"nodes: {{crm: {{dsn: *{SECRET}}}, billing: {{dsn: host=b}}}}",
        f"nodes: {{crm: {{dsn: !{SECRET} x}}, billing: {{dsn: host=b}}}}",
        f'nodes: {{crm: {{dsn: ["{SECRET}"]}}, billing: {{dsn: host=b}}}}',
        f"nodes: {{crm: {{dsn: host=a, password: {SECRET}}}, billing: {{dsn: host=b}}}}",
        f'nodes: {{crm: {{dsn: "${{{SECRET}}}"}}, billing: {{dsn: host=b}}}}',
    ],
)
def test_a_secret_in_the_wrong_place_is_not_shown(nodes: str) -> None:
    assert SECRET not in refusal(nodes + "\ntables: [a]")


def test_a_typing_error_in_one_node_hides_no_omission_in_the_other() -> None:
    message = refusal("nodes: {crm: {dns: host=a}, b: {}}\ntables: [a]")
    assert "nodes.crm.dns: unknown key; did you mean `dsn`?" in message
    assert "nodes.crm.dsn" not in message
    assert "nodes.b.dsn: is missing" in message


# ---- the errors themselves

ERRORS: list[type[SyncPipelineError]] = [
    CatalogMismatch,
    ConfigurationError,
    ConnectionFailed,
    LockTaken,
    NotInstalled,
    PassInterrupted,
    PoolerRefused,
]


@pytest.mark.parametrize("error_class", ERRORS)
def test_every_error_is_one_line_has_an_exit_code_and_survives_pickling(
    error_class: type[SyncPipelineError],
) -> None:
    error = error_class("what was found", remedy="what to do")
    assert str(error) == "what was found; what to do"
    assert error.exit_code == (3 if error_class is LockTaken else 1)
    loaded = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert (type(loaded), str(loaded), vars(loaded)) == (error_class, str(error), vars(error))


def test_an_error_says_where_it_was_met() -> None:
    assert str(NotInstalled("schema sync is missing", node="crm")) == (
        "crm: schema sync is missing; run `sync-pipeline install`"
    )
    mismatch = CatalogMismatch(
        "has no column total",
        node="crm",
        table="invoices",
        file="sync.yaml",
        place="tables[1].crm.columns.amount",
        remedy="add it",
    )
    assert str(mismatch) == (
        "sync.yaml: tables[1].crm.columns.amount: crm: has no column total; add it"
    )


@pytest.mark.parametrize(
    "said",
    [
        f"could not connect to postgresql://app:{SECRET}@h:5432/d?x=1",
        f"could not connect to postgresql://app:p/@{SECRET}@h:5432/d",
        f"host=h password={SECRET} user=u",
        f"host=h password = 'it\\'s {SECRET}' user=u",
        f"sslpassword={SECRET}",
        f"{{'password': '{SECRET}'}}",
    ],
)
def test_a_failed_connection_never_tells_the_password(said: str) -> None:
    error = ConnectionFailed(said, node="crm")
    assert str(error).startswith("crm: ")
    assert SECRET not in f"{error} {error!r} {error.args} {vars(error)}"


# ---- whatever is written

_WORDS = st.sampled_from(
    [
        *("nodes", "tables", "crm", "billing", "dsn", "table", "columns", "schema", "retry"),
        *("batch_size", "poll_seconds", "max_attempts", "base_seconds", "x", "a.b.c", "", "<<"),
        *("${CRM_DSN}", "${BILLING_DSN}", "${BROKEN_DSN}", "${POLICY}", "${TEN}", "${EMPTY}", "${"),
        *("$${", "${NONE}", "1", "-1", "nan", "1e999", "null", "~", "\0", "\ud800", "ä" * 40),
        *TABLE_OPTIONS,
        *POLICIES,
    ]
)
_SCALARS = st.one_of(
    _WORDS, st.text(max_size=8), st.none(), st.booleans(), st.integers(), st.floats(), st.dates()
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.one_of(_WORDS, st.integers()), inner)
    ),
    max_leaves=20,
)
_NODE = st.one_of(st.fixed_dictionaries({"dsn": _WORDS}), _VALUES)
_TABLE = st.one_of(
    _WORDS,
    st.fixed_dictionaries(
        {"name": _WORDS}, optional=dict.fromkeys((*TABLE_OPTIONS[1:], "crm"), _VALUES)
    ),
)
_DOCUMENTS = st.one_of(
    _VALUES,
    st.fixed_dictionaries(
        {
            "nodes": st.fixed_dictionaries({"crm": _NODE, "billing": _NODE}),
            "tables": st.lists(_TABLE, max_size=3),
        },
        optional={"retry": _VALUES, "batch_size": _SCALARS, "conflict": _WORDS, "schema": _WORDS},
    ),
)

VALID = NODES + INVOICES


def loads_or_is_refused(text: str) -> None:
    refused = None
    try:
        shown = repr(read(text))
    except ConfigurationError as error:
        refused = error
        shown = f"{error} {error!r} {error.problems}"
    assert refused is None or refused.__context__ is None
    # A name taken from the environment is shown once it is part of a configuration, never when refused.
    assert SECRET not in shown or (refused is None and "${POLICY}" in text)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(_DOCUMENTS)
def test_any_document_loads_or_is_refused_without_a_secret(document: object) -> None:
    loads_or_is_refused(yaml.safe_dump(document))


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, len(VALID)),
    st.integers(0, 30),
    st.text("{}[]:,'\"&*!|>%@#-?<~$ \n\t\0aé", max_size=6),
)
@example(0, 30, "")
def test_any_damage_to_a_file_is_survived_without_a_secret(at: int, cut: int, put: str) -> None:
    loads_or_is_refused(VALID[:at] + put + VALID[at + cut :])


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_is_survived(text: str) -> None:
    loads_or_is_refused(text)


def test_an_alias_bomb_is_refused() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    assert "holds more than 100000 values" in refusal("\n".join(lines))
    merges = ["a0: &a0 {x: 1}"]
    merges += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 40)]
    assert "unknown key" in refusal("\n".join(merges))


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "CRM_DSN", "host=a")
    monkeypatch.setitem(os.environ, "BILLING_DSN", "host=b")
    assert parse(NODES + "tables: [a]").first.dsn.get_secret_value() == "host=a"
