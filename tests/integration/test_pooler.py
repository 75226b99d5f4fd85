"""A pooler in front of a node: refused where it hands sessions round, since no lock would last there."""

import os
import pwd
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest
from typer.testing import CliRunner

from sync_pipeline import doctor
from sync_pipeline.cli import app
from sync_pipeline.config import Config, load
from sync_pipeline.database import connected
from sync_pipeline.errors import PoolerRefused
from sync_pipeline.link import lead
from tests.engine import equal, installed, sync_pair
from tests.helpers import Pair

PGBOUNCER = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")


@contextmanager
def pooled(pair: Pair, mode: str, directory: Path) -> Iterator[Config]:
    """The pair's configuration, with crm behind a pgbouncer of its own in this mode."""
    if PGBOUNCER is None:
        pytest.skip("pgbouncer is not installed")
    database = urlsplit(pair.crm.dsn)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    name = database.path.removeprefix("/")
    (directory / "users.txt").write_text('"postgres" ""\n')
    (directory / "pgbouncer.ini").write_text(
        f"[databases]\n{name} = host=127.0.0.1 port={database.port} user=postgres\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nauth_type = any\n"
        f"pool_mode = {mode}\nunix_socket_dir =\n"
        "ignore_startup_parameters = extra_float_digits\n"
    )
    command = [PGBOUNCER, str(directory / "pgbouncer.ini")]
    user = None
    if os.getuid() == 0:
        # It refuses to run as root.
        user = "nobody"
        for path in (directory, *directory.parents):
            if path.stat().st_uid == 0 and path != Path("/"):
                path.chmod(path.stat().st_mode | 0o011)
        for path in directory.iterdir():
            shutil.chown(path, pwd.getpwnam(user).pw_uid)
    with subprocess.Popen(
        command, user=user, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as pooler:
        try:
            dsn = f"postgresql://postgres@127.0.0.1:{port}/{name}"
            _wait_for(dsn, pooler)
            yield load(pair.config_path, {**pair.environment, "CRM_DSN": dsn})
        finally:
            pooler.terminate()


def _wait_for(dsn: str, pooler: subprocess.Popen[bytes]) -> None:
    for _ in range(100):
        assert pooler.poll() is None, pooler.stderr.read() if pooler.stderr else ""
        try:
            psycopg.connect(dsn, connect_timeout=5).close()
        except psycopg.OperationalError:
            continue
        return
    raise AssertionError("pgbouncer does not answer")


def test_a_pooler_in_transaction_mode_is_refused(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(pair)
    with (
        pooled(pair, "transaction", tmp_path) as config,
        pytest.raises(PoolerRefused, match=r"crm: .*pooler in transaction mode.*direct connection"),
        lead(config),
    ):
        pass
    with pooled(pair, "transaction", tmp_path) as config, monkeypatch.context() as patch:
        patch.setenv("CRM_DSN", config.first.dsn.get_secret_value())
        patch.setenv("BILLING_DSN", pair.billing.dsn)
        done = CliRunner().invoke(app, ["install", "--config", str(pair.config_path)])
        assert isinstance(done.exception, PoolerRefused)
        found = [f for f in doctor.examine(config) if f.check == "pooler"]
    assert [(f.level, f.node) for f in found] == [("error", "crm")]
    assert pair.crm.value("select count(*) from pg_locks where locktype = 'advisory'") == 0


def test_a_pooler_in_session_mode_is_accepted(pair: Pair, tmp_path: Path) -> None:
    installed(pair)
    with pooled(pair, "session", tmp_path) as config, lead(config):
        pass
    pair.crm.insert("accounts", id=1, name="first")
    sync_pair(pair)
    assert equal(pair)


def test_the_server_notices_within_a_minute_that_a_client_is_gone(pair: Pair) -> None:
    config = installed(pair)
    with connected(config.first, config, "writer") as connection:
        seconds = {
            name: connection.execute(
                "select setting::int from pg_settings where name = %s", [name]
            ).fetchone()
            for name in ("tcp_keepalives_idle", "tcp_keepalives_interval", "tcp_keepalives_count")
        }
    idle, interval, count = (row[0] for row in seconds.values() if row is not None)
    assert idle + interval * count < 60
