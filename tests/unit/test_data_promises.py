"""`docs/data.md` promises nothing without naming the tests that show it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_, *_PARTS = re.split(
    r"^## (.+)$", (ROOT / "docs" / "data.md").read_text(encoding="utf-8"), flags=re.MULTILINE
)
SECTIONS = dict(zip(_PARTS[::2], _PARTS[1::2], strict=True))
TESTS = ROOT / "tests" / "integration"
NAMED = re.compile(r"\btest_\w+")


def rows(section: str) -> list[str]:
    """The rows of the tables of a section, without headings and rules."""
    tables = re.findall(r"(?:^\|.*\n)+", SECTIONS[section], re.MULTILINE)
    return [row for table in tables for row in table.splitlines()[2:]]


@pytest.mark.parametrize("section", SECTIONS)
def test_every_promise_names_its_tests(section: str) -> None:
    everything = re.search(r"\bAll in (test_\w+)", SECTIONS[section])
    for row in rows(section):
        assert everything or NAMED.search(row.rsplit("|", 2)[-2]), row
    assert NAMED.search(SECTIONS[section]), f"{section} names no test"


@pytest.mark.parametrize(
    "name", sorted({name for text in SECTIONS.values() for name in NAMED.findall(text)})
)
def test_every_named_module_holds_tests(name: str) -> None:
    path = TESTS / f"{name}.py"
    assert re.search(r"^def test_", path.read_text(encoding="utf-8"), re.MULTILINE), path
