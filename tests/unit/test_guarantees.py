"""docs/guarantees.md names a test for each promise, and all of them exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/guarantees.md").read_text(encoding="utf-8")
NAMED = re.findall(r"`(test_\w+\.py)::(test_\w+)`", PAGE)


def test_every_test_that_is_named_exists() -> None:
    missing = [
        f"{file}::{name}"
        for file, name in NAMED
        if not any(
            f"def {name}(" in path.read_text("utf-8") for path in ROOT.glob(f"tests/*/{file}")
        )
    ]
    assert NAMED
    assert not missing


def test_every_promise_names_a_test() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and "---" not in line]
    promises = [line for line in rows if not line.startswith("| promise ")]
    assert promises
    assert [line for line in promises if not re.search(r"`test_\w+\.py::", line)] == []
