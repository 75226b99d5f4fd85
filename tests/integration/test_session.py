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


def test_no_timeout_of_a_database_ends_a_long_batch(pair: Pair) -> None:
    config = config_of(pair)
    database = pair.crm.value("select current_database()")
    names = ["statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"]
    if int(pair.crm.value("select current_setting('server_version_num')")) >= 170000:
        names.append("transaction_timeout")
    for name in names:
        pair.crm.execute(f"alter database {database} set {name} = '1s'")
    shown = {}
    for role in ("writer", "reader"):
        with connected(config.first, config, role) as connection:
            rows = [connection.execute(f"show {name}".encode()).fetchone() for name in names]
        shown[role] = [row[0] for row in rows if row is not None]
    assert shown["writer"] == ["0", "10s", "10min", "0"][: len(names)]
    # Its snapshot stays open while a batch is applied on the other node.
    assert shown["reader"] == ["0", "10s", "1h", "0"][: len(names)]
