"""`sync-pipeline demo --ui`: the two servers with changes trickling in on both sides, and Dagster that syncs them."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import LiteralString

import psycopg
from rich.console import Console

from sync_pipeline.demo import story
from sync_pipeline.demo.shop import Shop, opened

PORT = 3000
CHANGE_SECONDS = 1.0

# Each round of these leaves about as many rows as it found. The database picks the records.
_ROUND: tuple[tuple[str, LiteralString], ...] = (
    (
        "crm",
        (
            "insert into accounts (id, name) select max(id) + 1, 'Stark ' || max(id) + 1 "
            "from accounts where id < 1000000"
        ),
    ),
    (
        "crm",
        (
            "insert into users (id, account_id, email, name) "
            "select max(id) + 1, (select max(id) from accounts where id < 1000000), "
            "'user' || max(id) + 1 || '@example.org', 'Pepper' from users where id < 1000000"
        ),
    ),
    (
        "billing",
        (
            "update orders set note = 'paid at ' || to_char(clock_timestamp(), 'HH24:MI:SS') "
            "where id in (select id from orders order by random() limit 5)"
        ),
    ),
    (
        "billing",
        (
            "insert into orders (id, user_id, amount) "
            "select max(id) + 1, (select id from users order by random() limit 1), 19.95 from orders"
        ),
    ),
    # Twice the same record: when no pass comes between them, a conflict.
    ("crm", "update accounts set plan = 'team' where id = (select min(id) from accounts)"),
    ("billing", "update accounts set plan = 'gold' where id = (select min(id) from accounts)"),
    (
        "crm",
        "delete from users where id = (select id from users order by random() limit 1)",
    ),
    (
        "billing",
        (
            "delete from accounts as a where not exists (select from users where account_id = a.id) "
            "and id > (select min(id) from accounts)"
        ),
    ),
)


def run(directory: Path) -> int:
    """Start servers, traffic and `dagster dev`; return the exit code of Dagster when it has ended."""
    # Dagster takes seconds to import: only here.
    from sync_pipeline.defs.dev import run_dagster_dev  # noqa: PLC0415

    console = Console()
    console.print("starting two PostgreSQL servers, then Dagster (Ctrl-C stops everything)")
    with opened(directory) as shop:
        shop.install()
        story.seed(shop)
        for name, dsn in shop.environment.items():
            console.print(f"  {name}={dsn}", highlight=False, soft_wrap=True)
        console.print(f"  http://127.0.0.1:{PORT}", highlight=False)
        with _trickling(shop):
            return run_dagster_dev(
                shop.config_path, shop.environment, directory / "dagster_home", port=PORT
            )


@contextmanager
def _trickling(shop: Shop) -> Iterator[None]:
    """Change something on one of the nodes every second, in a thread, until the block ends."""
    stop = threading.Event()
    thread = threading.Thread(target=trickle, args=(shop, stop), name="traffic")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def trickle(shop: Shop, stop: threading.Event) -> None:
    """Make changes until told to stop."""
    while not stop.is_set():
        change(shop, stop)


def change(shop: Shop, stop: threading.Event) -> None:
    """Make each change once, one after the other."""
    nodes = {node.name: node for node in shop.nodes}
    for name, statement in _ROUND:
        # What the other side changes meanwhile may get in the way: an application would try again, we go on.
        with suppress(psycopg.OperationalError, psycopg.IntegrityError):
            nodes[name].execute(statement)
        if stop.wait(CHANGE_SECONDS):
            return
