"""The story of the demo, step by step: what two applications and an operator do, and what comes of it.

Each step says what it does, does it, waits until it has arrived and checks what is promised. A promise that is not
kept raises `DemoFailed`.
"""

from collections.abc import Callable
from typing import LiteralString

from sync_pipeline.demo.shop import Application, Shop
from sync_pipeline.demo.stage import DemoFailed, Stage

# Each application numbers its new records from a range of its own.
BILLING_FROM = 1_000_000

_ADD_ACCOUNTS: LiteralString = """
insert into accounts (id, name, plan)
select %(first)s + n, (array['Acme', 'Globex', 'Initech', 'Umbrella', 'Hooli'])[n %% 5 + 1] || ' ' || %(first)s + n,
    (array['basic', 'team'])[n %% 2 + 1]
from generate_series(1, %(count)s) as n
"""
_ADD_USERS: LiteralString = """
insert into users (id, account_id, email, name)
select %(first)s + n, %(first)s + (n - 1) / 3 + 1, 'user' || %(first)s + n || '@example.org',
    (array['Ada', 'Grace', 'Edsger', 'Barbara', 'Donald', 'Alan', 'Tony'])[n %% 7 + 1]
from generate_series(1, %(count)s * 3) as n
"""
_ADD_ORDERS: LiteralString = """
insert into orders (id, user_id, amount)
select %(first)s * 10 + n, %(first)s + (n - 1) / 4 + 1, (n * 37 %% 900) + 0.95
from generate_series(1, %(count)s * 12) as n
"""


def seed(shop: Shop) -> None:
    """Give each node accounts, users and orders of its own."""
    for node, first, count in ((shop.crm, 0, 30), (shop.billing, BILLING_FROM, 10)):
        for statement in (_ADD_ACCOUNTS, _ADD_USERS, _ADD_ORDERS):
            node.connection.execute(statement, {"first": first, "count": count})


def install(stage: Stage) -> None:
    """Install capture on both nodes."""
    statements = stage.shop.install()
    stage.say(f"{statements} statements: schema sync and four triggers on each table; no superuser")


def work_alone(stage: Stage) -> None:
    """Both applications work while nobody syncs."""
    seed(stage.shop)
    waiting = [node.value("select pending from sync.sync_status") for node in stage.shop.nodes]
    stage.say(f"new accounts, users and orders on both sides; {waiting[0]} and {waiting[1]} wait")
    stage.expect("what waits on crm and billing", waiting, [480, 160])


def catch_up(stage: Stage) -> None:
    """Start consumers; one leads, the other stands by."""
    first = stage.start_consumer("A")
    stage.wait("consumer A leads", lambda: stage.shop.leader(stage.shop.billing))
    second = stage.start_consumer("B")
    seconds = stage.settle()
    stage.say(f"`sync-pipeline stream` twice: process {first.pid} leads, {second.pid} stands by")
    stage.say(f"640 records applied, both sides equal {seconds:.1f} s after A took the lead")


def travel_live(stage: Stage) -> None:
    """Single changes travel both ways while one looks on."""
    crm, billing = stage.shop.nodes
    changes: tuple[tuple[str, Application, LiteralString], ...] = (
        ("insert on crm", crm, "insert into accounts (id, name) values (31, 'Stark 31')"),
        ("update on billing", billing, "update accounts set plan = 'gold' where id in (2, 4, 6)"),
        ("delete on crm", crm, "delete from orders where user_id = 5"),
        ("key update on billing", billing, "update accounts set id = 1000031 where id = 31"),
    )
    for title, node, statement in changes:
        records = node.execute(statement)
        seconds = stage.settle()
        stage.say(f"{title:<22} equal after {seconds * 1000:4.0f} ms (records: {records})")


def child_before_parent(stage: Stage) -> None:
    """A dependent is written before its parent, so its event comes first."""
    crm = stage.shop.crm
    with crm.transaction() as connection:
        connection.execute("set constraints all deferred")
        connection.execute("insert into orders (id, user_id, amount) values (500, 200, 19.95)")
        connection.execute(
            "insert into users (id, account_id, email, name) values (200, 1, 'late@example.org', 'Late')"
        )
        events = connection.execute(
            "select table_name, record_id from sync.sync_events order by id"
        ).fetchall()
        connection.commit()
    stage.say(f"events in the order of their ids: {', '.join(f'{t} {key}' for t, key in events)}")
    stage.expect("the first event", events[0], ("orders", "500"))
    stage.settle()
    stage.say("billing got the user first, then the order: tables go by their foreign keys")


def cascade(stage: Stage) -> None:
    """One delete takes its children along on both sides."""
    billing, crm = stage.shop.billing, stage.shop.crm
    before = sum(crm.observe().rows.values())
    billing.execute("delete from accounts where id in (1, 2)")
    stage.settle()
    gone = before - sum(crm.observe().rows.values())
    stage.say(f"2 accounts deleted on billing; with their users and orders {gone} rows left crm")
    if gone <= 2:
        raise DemoFailed(f"{gone} rows were deleted, expected the accounts and all their children")


def poison(stage: Stage) -> None:
    """A record that the other side refuses fails alone."""
    crm, billing = stage.shop.nodes
    crm.execute(
        "insert into orders (id, user_id, amount) "
        "select 600 + n, 10, case when n = 3 then 5000 else 50 end from generate_series(1, 5) as n"
    )
    stage.drain()
    arrived = billing.value("select count(*) from orders where id between 601 and 605")
    stage.expect("orders that billing took", arrived, 4)
    error_class, error = crm.rows("select error_class, error from sync.sync_failures")[0]
    stage.say("billing allows at most 1000.00 for an order; of five new ones, one is over it")
    stage.say(f"four arrived, one is in crm's sync_failures: {error_class}")
    stage.say(f"  {error}")


def repair(stage: Stage) -> None:
    """The operator removes the cause and retries by one SQL statement."""
    crm, billing = stage.shop.nodes
    billing.execute("alter table orders drop constraint orders_within_limit")
    crm.execute(
        "update sync.sync_failures set next_attempt_at = now() where table_name = 'orders' and record_id = '603'"
    )
    stage.wait(
        "the failure is gone",
        lambda: not crm.value("select exists (select from sync.sync_failures)"),
    )
    stage.settle()
    stage.say("the limit is lifted on billing, and on crm one statement says: now")
    stage.say("  update sync.sync_failures set next_attempt_at = now() where record_id = '603';")
    stage.say("the order is in both databases, sync_failures is empty")


def kill_in_mid_batch(stage: Stage) -> None:
    """`kill -9` before the batch is committed; the consumer that stood by takes over."""
    crm, billing = stage.shop.nodes
    leader = stage.consumers[0]
    changed: set[int] = set()

    def look() -> int:
        done: int = billing.value("select count(*) from orders where note = 'checked'")
        changed.add(done)
        return done

    with billing.transaction() as clerk:
        # A clerk who has one order open: the batch has to wait for it, so it is certainly in the middle.
        clerk.execute("select from orders where id = 100 for update")
        total = crm.execute("update orders set note = 'checked'")
        session = stage.wait_for_block(billing, clerk.info.backend_pid)
        look()
        leader.kill()
        stage.say(f"{total} orders changed on crm; kill -9 {leader.pid} while it applies them")
        waiting = crm.value("select pending from sync.sync_status")
        stage.expect("events that still wait on crm", waiting, total)
    stage.wait("the batch is complete", lambda: look() == total)
    stage.settle()
    stage.expect("a new leader", stage.shop.leader(billing) not in {None, session}, expected=True)
    stage.say(
        f"process {stage.consumers[1].pid} took over and applied the batch from its beginning"
    )
    stage.say(f"readers of billing saw {_either(changed)} changed orders, never a part of them")
    stage.expect("numbers of changed orders that were seen", changed, {0, total})


def kill_between_commits(stage: Stage) -> None:
    """`kill -9` when billing has committed and crm has not acknowledged: the ledger knows."""
    crm, billing = stage.shop.nodes
    leader = stage.consumers[1]
    with crm.transaction() as operator:
        # Only the acknowledgement writes to this row, so the consumer stops exactly between its two commits.
        operator.execute("select from sync.sync_node for update")
        total = crm.execute("update users set name = name || ' M.' where id between 10 and 19")
        stage.wait_for_block(crm, operator.info.backend_pid)
        leader.kill()
    stage.wait(
        "nobody leads", lambda: not any(stage.shop.leader(node) for node in stage.shop.nodes)
    )
    arrived = billing.value("select count(*) from users where name like '% M.'")
    stage.expect("users that billing has", arrived, total)
    stage.expect("events that crm still has", crm.observe().pending, total)
    ledger = billing.value("select count(*) from sync.sync_applied")
    stage.expect("batches in billing's ledger", ledger, 1)
    stage.say(
        f"billing has the {arrived} users, crm still holds their events: kill -9 {leader.pid}"
    )
    stage.say(
        "the batch is in billing's ledger: it was written in the same transaction as the rows"
    )


def conflict(stage: Stage) -> None:
    """While nobody leads both sides go on; what comes of it is decided and logged."""
    crm, billing = stage.shop.nodes
    crm.execute("update accounts set plan = 'crm says team' where id = 3")
    billing.execute("update accounts set plan = 'billing says gold' where id = 3")
    # In the batch that billing has already committed: a change on top of it, and no conflict.
    billing.execute("update users set name = 'Renamed' where id = 10")
    stage.say("nobody leads, work goes on: both sides change account 3, billing renames user 10")
    consumer = stage.start_consumer("C")
    stage.settle()
    stage.say(f"process {consumer.pid} recovers: it drops the 10 events and applies nothing twice")
    logged = [
        row
        for node in stage.shop.nodes
        for row in node.rows(
            "select table_name, record_id, kind, winner, local_row ->> 'plan', remote_row ->> 'plan' "
            "from sync.sync_conflicts"
        )
    ]
    stage.expect(
        "conflicts", [row[:4] for row in logged], [("accounts", "3", "update_update", "billing")]
    )
    kept, lost = logged[0][4:]
    stage.say(f"one conflict, account 3: the later update wins ({kept!r}),")
    stage.say(f"the other row is kept in sync_conflicts ({lost!r})")
    stage.expect("user 10 on crm", crm.value("select name from users where id = 10"), "Renamed")
    stage.wait(
        "the ledgers are empty",
        lambda: (
            not any(
                node.value("select exists (select from sync.sync_applied)")
                for node in stage.shop.nodes
            )
        ),
    )


def stop(stage: Stage) -> None:
    """Stop the last consumer as an operator would."""
    stage.settle()
    code = stage.consumers[-1].stop()
    stage.expect("the consumer's exit code after SIGTERM", code, 0)
    stage.say(f"SIGTERM to {stage.consumers[-1].pid}: it ends the pass and exits 0")


STEPS: tuple[tuple[str, Callable[[Stage], None]], ...] = (
    ("sync-pipeline install", install),
    ("Both sides work, nobody syncs: changes wait", work_alone),
    ("Consumers start; one leads", catch_up),
    ("Changes travel in both directions", travel_live),
    ("A child that comes before its parent", child_before_parent),
    ("A delete that cascades", cascade),
    ("A record that the other side refuses", poison),
    ("Repaired and retried", repair),
    ("kill -9 in mid-batch", kill_in_mid_batch),
    ("kill -9 between the two commits", kill_between_commits),
    ("A conflict, and the recovery", conflict),
    ("The end", stop),
)


def _either(values: set[int]) -> str:
    return " or ".join(map(str, sorted(values)))
