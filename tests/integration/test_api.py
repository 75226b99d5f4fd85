"""The Python API: what docs/api.md says can be imported, can be, and does what it says."""

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import assert_type

import pytest

import sync_pipeline
from sync_pipeline import Config, Counts, LockTaken, Totals, load, sync
from sync_pipeline.link import lead
from tests.engine import installed
from tests.helpers import Pair

PAGE = (Path(__file__).resolve().parents[2] / "docs/api.md").read_text("utf-8")


def documented() -> list[str]:
    """The names in the first column of the page's table."""
    return re.findall(r"^\| `(\w+)", PAGE, re.MULTILINE)


def test_what_is_documented_is_what_can_be_imported() -> None:
    assert sorted(documented()) == sorted(sync_pipeline.__all__)
    assert {name for name in documented() if not hasattr(sync_pipeline, name)} == set()
    assert set(sync_pipeline.__all__) <= set(dir(sync_pipeline))
    assert not hasattr(sync_pipeline, "unheard_of")


def test_the_version_is_that_of_the_package() -> None:
    assert sync_pipeline.__version__ == version("sync-pipeline")


def test_who_does_not_ask_for_dagster_does_not_import_it() -> None:
    code = "import sys; from sync_pipeline import load, sync, LockTaken; print('dagster' in sys.modules)"
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert ended.stdout == "False\n"


def test_the_example_of_the_page_syncs(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed(pair)
    pair.crm.execute("insert into accounts (id, name) values (1, 'new')")
    monkeypatch.chdir(pair.config_path.parent)
    example = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert example is not None
    exec(compile(example[1], "docs/api.md", "exec"), {})  # noqa: S102 - our own page
    assert pair.billing.rows("accounts") == pair.crm.rows("accounts")
    assert capsys.readouterr().out.splitlines() == [
        "crm->billing: 1 upserted, 0 deleted, 0 failed",
        "billing->crm: 0 upserted, 0 deleted, 0 failed",
    ]


def test_the_names_are_typed_and_an_error_says_what_to_decide(pair: Pair) -> None:
    installed(pair)
    config = assert_type(load(pair.config_path), Config)
    totals = assert_type(sync(config), Totals)
    assert totals.passes == 0
    assert totals.directions["crm->billing"] == Counts()
    with lead(config), pytest.raises(LockTaken) as caught:
        sync(config)
    assert caught.value.node == "crm"
