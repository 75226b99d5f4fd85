"""docs/guarantees.md and docs/doctor.md name a test for each promise and each finding, and all of them exist."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = {name: (ROOT / f"docs/{name}.md").read_text("utf-8") for name in ("guarantees", "doctor")}


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_every_test_that_is_named_exists(page: str) -> None:
    named = re.findall(r"(test_\w+\.py)::(test_\w+)`", page)
    missing = [
        f"{file}::{name}"
        for file, name in named
        if not any(
            f"def {name}(" in path.read_text("utf-8") for path in ROOT.glob(f"tests/*/{file}")
        )
    ]
    assert named
    assert not missing


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_every_promise_names_a_test(page: str) -> None:
    rows = [line for line in page.splitlines() if line.startswith("| ") and "---" not in line]
    promises = [line for line in rows if not line.startswith(("| promise ", "| check "))]
    assert promises
    assert [line for line in promises if not re.search(r"`test_\w+\.py::", line)] == []


def checks() -> Iterator[str]:
    """The names of the checks in the code of doctor."""
    for module in ("doctor", "node_checks", "table_checks"):
        tree = ast.parse((ROOT / f"sync_pipeline/{module}.py").read_text("utf-8"))
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            if ast.unparse(call.func) in {"Finding", "_finding", "Finding.of"} and isinstance(
                call.args[1], ast.Constant
            ):
                yield str(call.args[1].value)


def test_every_finding_of_doctor_is_on_its_page_and_no_other() -> None:
    rows = [line for line in PAGES["doctor"].splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named == set(checks())
