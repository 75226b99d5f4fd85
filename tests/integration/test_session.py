"""The sessions of the pipeline, whatever the settings of databases and roles are."""

import pytest

from sync_pipeline.database import connected
from tests.engine import config_of
from tests.helpers import Pair


@pytest.mark.parametrize(("setting", "used"), [("off", "on"), ("local", "local")])
def test_a_commit_of_the_pipeline_is_never_asynchronous(
    pair: Pair, setting: str, used: str
) -> None:
    config = config_of(pair)
    database = pair.crm.value("select current_database()")
    pair.crm.execute(f"alter database {database} set synchronous_commit = {setting}")
    with connected(config.first, config, "test") as connection:
        row = connection.execute("show synchronous_commit").fetchone()
    assert row == (used,)
