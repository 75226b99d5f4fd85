"""Columns and tables come and go on a pair that runs: nothing stops, applications keep working, nothing is lost."""

import threading
from collections.abc import Iterator
from unittest import mock

import pytest

from sync_pipeline import operate, passes, stream
from sync_pipeline.errors import CatalogMismatch, PassInterrupted, TableMissing
from sync_pipeline.link import Link, lead
from sync_pipeline.passes import Pass
from sync_pipeline.records import DirectionReport
from sync_pipeline.stream import Listener
from tests.engine import config_of, equal, installed, sync_pair
from tests.helpers import TABLES, Node, Pair, write_config


@pytest.fixture
def link(pair: Pair) -> Iterator[Link]:
    """A consumer that leads, with the schema as it was when it began."""
    config = installed(pair)
    pair.crm.insert("accounts", id=1, name="one", plan="small")
    pair.crm.insert("users", id=1, account_id=1, email="a@x.org")
    with lead(config) as link:
        passes.run(link)
        yield link


def failures(node: Node) -> list[tuple[object, ...]]:
    return node.rows("select table_name, record_id, state, error_class from sync.sync_failures")


def test_a_column_added_on_one_side_first_is_left_out_and_then_picked_up(
    pair: Pair, link: Link
) -> None:
    pair.crm.execute("alter table accounts add column city text")
    pair.crm.execute("update accounts set city = 'Ulm', name = 'two' where id = 1")
    passes.run(link)
    link.read_catalog()
    pair.billing.execute("update accounts set plan = 'large' where id = 1")
    passes.run(link)
    assert pair.crm.rows("accounts") == [(1, "two", "large", None, "Ulm")]
    assert pair.billing.rows("accounts") == [(1, "two", "large", None)]
    pair.billing.execute("alter table accounts add column city text")
    installed(pair)
    link.read_catalog()
    pair.crm.execute("update accounts set city = 'Bonn' where id = 1")
    passes.run(link)
    assert equal(pair)


def test_what_was_written_before_both_sides_had_the_column_is_sent_by_a_mark(pair: Pair) -> None:
    installed(pair)
    pair.crm.insert("accounts", id=1, name="one")
    pair.crm.execute("alter table accounts add column city text")
    pair.crm.execute("update accounts set city = 'Ulm'")
    sync_pair(pair)
    pair.billing.execute("alter table accounts add column city text")
    installed(pair)
    sync_pair(pair)
    assert not equal(pair)
    pair.crm.execute(
        "insert into sync.sync_events (table_name, record_id) "
        "select 'accounts', id::text from accounts where city is not null"
    )
    sync_pair(pair)
    assert equal(pair)


def test_an_application_writes_on_after_it_dropped_a_column(pair: Pair, link: Link) -> None:
    pair.crm.execute("alter table accounts drop column plan")
    pair.crm.execute("update accounts set name = 'two'")
    pair.crm.insert("accounts", id=2, name="new")
    pair.crm.execute("delete from accounts where id = 2")
    assert pair.crm.pending() == 3


def test_a_dropped_column_keeps_its_value_on_the_other_side_until_it_goes_there_too(
    pair: Pair, link: Link
) -> None:
    pair.crm.execute("alter table accounts drop column plan")
    pair.crm.execute("update accounts set name = 'two'")
    with pytest.raises(CatalogMismatch):
        passes.run(link)
    link.read_catalog()
    passes.run(link)
    assert pair.billing.rows("accounts") == [(1, "two", "small", None)]
    pair.billing.execute("alter table accounts drop column plan")
    pair.billing.execute("update accounts set name = 'three'")
    passes.run(link)
    assert pair.crm.value("select name from accounts") == "three"
    installed(pair)
    pair.crm.execute("update accounts set name = 'four'")
    passes.run(link)
    assert equal(pair)


def test_a_renamed_column_stops_neither_application_nor_consumer(pair: Pair, link: Link) -> None:
    for node in pair.nodes:
        node.execute("alter table accounts rename column plan to tariff")
        node.execute(f"update accounts set name = '{node.name}'")
    link.read_catalog()
    while any(report.did_something for report in passes.run(link)):
        pass
    assert equal(pair)
    installed(pair)
    pair.billing.execute("update accounts set tariff = 'huge'")
    passes.run(link)
    assert equal(pair)


@pytest.mark.parametrize("column", ["seen", "twice", "word"])
def test_a_table_with_excluded_and_generated_columns_may_lose_any(pair: Pair, column: str) -> None:
    for node in pair.nodes:
        node.execute(
            "create table t (id int primary key, word text, n int default 1, seen int, "
            "twice int generated always as (n * 2) stored)"
        )
    write_config(pair.config_path, [{"name": "t", "exclude": ["seen"]}])
    installed(pair)
    pair.crm.execute("insert into t (id, word) values (1, 'a')")
    sync_pair(pair)
    pair.crm.execute("update t set seen = 5")
    assert pair.crm.pending() == 0
    pair.crm.execute(f"alter table t drop column {column}")
    pair.crm.execute("update t set n = 7")
    sync_pair(pair)
    assert pair.billing.value("select n from t") == 7


def test_a_table_dropped_on_one_side_is_left_out_and_the_others_go_on(
    pair: Pair, link: Link
) -> None:
    pair.crm.execute("drop table orders")
    pair.billing.execute("insert into orders values (1, 1, 10, null)")
    pair.crm.execute("update accounts set name = 'two'")
    passes.run(link)
    assert equal(pair, ("accounts", "users"))
    assert any("orders" in warning for warning in link.catalog.warnings)
    assert failures(pair.billing) == []
    assert pair.billing.pending() == 1


def test_a_table_that_comes_back_gets_what_waited_for_it(pair: Pair) -> None:
    installed(pair)
    pair.billing.insert("accounts", id=1, name="one")
    pair.billing.insert("users", id=1, account_id=1, email="a@x.org")
    pair.crm.execute("drop table orders")
    pair.billing.execute("insert into orders values (1, 1, 10, null)")
    sync_pair(pair)
    assert failures(pair.billing) == []
    assert pair.billing.pending() == 1
    pair.crm.execute(
        "create table orders (id bigint primary key, user_id int not null references users, "
        "amount numeric(12, 2) not null, note text)"
    )
    installed(pair)
    sync_pair(pair)
    assert failures(pair.billing) == []
    assert equal(pair)


@pytest.mark.parametrize(
    ("broken", "mended"),
    [
        ("alter table orders drop constraint orders_pkey", "alter table orders add primary key (id)"),
        ("alter table orders rename column id to number", "alter table orders rename column number to id"),
        ("create table more () inherits (orders)", "drop table more"),
    ],
    ids=["no key", "another key", "inherited from"],
)  # fmt: skip
def test_a_table_that_can_no_longer_be_synced_is_left_out_and_the_others_go_on(
    pair: Pair, broken: str, mended: str
) -> None:
    config = installed(pair)
    pair.crm.insert("accounts", id=1, name="one")
    stop = threading.Event()

    def passed(reports: list[DirectionReport]) -> None:
        rows = pair.billing.rows("select name, plan from accounts")
        if rows == [("one", None)]:
            pair.billing.execute(broken)
            pair.crm.insert("users", id=1, account_id=1, email="a@x.org")
            pair.crm.insert("orders", id=1, user_id=1, amount=1)
            pair.crm.execute("update accounts set name = 'two'")
        elif rows == [("two", None)]:
            assert pair.billing.rows("orders") == []
            pair.billing.execute(mended)
            pair.crm.execute("update accounts set plan = 'large'")
        if pair.crm.pending() == 0:
            stop.set()

    with mock.patch.object(stream, "CATALOG_SECONDS", 0.0):
        stream.stream(config, stop, seconds=60, listener=Listener(passed=passed))
    assert pair.billing.rows("select name, plan from accounts") == [("two", "large")]
    assert equal(pair)


def test_a_refused_delete_that_is_retried_while_a_table_is_missing_is_not_forgotten(
    pair: Pair,
) -> None:
    installed(pair)
    pair.crm.insert("accounts", id=1, name="one")
    sync_pair(pair)
    pair.billing.execute(
        """create function refuse() returns trigger language plpgsql as
        $$ begin raise check_violation; end $$;
        create trigger refuse before delete on accounts for each row execute function refuse()"""
    )
    pair.crm.execute("delete from accounts")
    sync_pair(pair)
    assert len(failures(pair.crm)) == 1
    pair.billing.execute("drop trigger refuse on accounts")
    pair.billing.insert("users", id=1, account_id=1, email="a@x.org")
    pair.crm.execute("drop table users cascade")
    pair.crm.execute("update sync.sync_failures set next_attempt_at = now()")

    sync_pair(pair)

    assert len(failures(pair.crm)) == 1
    pair.billing.execute("delete from users")
    sync_pair(pair)
    assert pair.billing.rows("accounts") == []
    assert failures(pair.crm) == []


def test_install_and_marking_refuse_while_a_table_is_missing(pair: Pair) -> None:
    installed(pair)
    pair.crm.execute("drop table orders")
    with pytest.raises(TableMissing, match="orders does not exist"):
        installed(pair)


def test_nothing_is_synced_when_every_table_is_missing(pair: Pair) -> None:
    config = installed(pair)
    pair.crm.execute("drop table orders, users, accounts")
    with pytest.raises(TableMissing), lead(config):
        pass


def test_a_consumer_that_does_not_know_a_new_table_yet_loses_nothing_of_it(
    pair: Pair, link: Link
) -> None:
    for node in pair.nodes:
        node.execute("create table invoices (id int primary key, total int)")
    write_config(pair.config_path, [*TABLES, "invoices"])
    config = installed(pair)
    pair.crm.execute("insert into invoices values (1, 100)")
    pair.crm.execute("update accounts set name = 'two'")
    passes.run(link)
    assert pair.billing.value("select name from accounts") == "two"
    assert failures(pair.crm) == [("invoices", "1", "dead", "42P01")]
    for side in link.sides.values():
        side.writer.close()
    with lead(config) as successor:
        passes.run(successor)
    assert equal(pair, (*TABLES, "invoices"))
    assert failures(pair.crm) == []


def test_the_last_change_wins_of_those_that_a_consumer_did_not_know_yet(
    pair: Pair, link: Link
) -> None:
    for node in pair.nodes:
        node.execute("create table invoices (id int primary key, word text)")
    write_config(pair.config_path, [*TABLES, "invoices"])
    config = installed(pair)
    pair.crm.execute("insert into invoices values (1, 'first')")
    pair.billing.execute("insert into invoices values (1, 'between')")
    passes.run(link)
    pair.crm.execute("update invoices set word = 'last'")
    passes.run(link)
    for side in link.sides.values():
        side.writer.close()
    with lead(config) as successor:
        passes.run(successor)
    assert pair.billing.rows("invoices") == pair.crm.rows("invoices") == [(1, "last")]
    assert failures(pair.crm) == failures(pair.billing) == []


def test_a_table_that_left_the_configuration_is_captured_no_more(pair: Pair) -> None:
    installed(pair)
    write_config(pair.config_path, ["accounts", "users"])
    installed(pair)
    pair.crm.insert("accounts", id=1, name="one")
    pair.crm.insert("users", id=1, account_id=1, email="a@x.org")
    pair.crm.execute("insert into orders values (1, 1, 10, null)")
    sync_pair(pair)
    assert equal(pair, ("accounts", "users"))
    assert pair.billing.rows("orders") == []
    pair.crm.execute("drop table orders")
    sync_pair(pair)


def test_a_column_that_is_required_on_one_side_delays_records_until_the_other_has_it(
    pair: Pair,
) -> None:
    installed(pair)
    pair.billing.execute("alter table accounts add column city text not null default 'Ulm'")
    pair.billing.execute("alter table accounts alter column city drop default")
    pair.crm.insert("accounts", id=1, name="one")
    sync_pair(pair)
    assert failures(pair.crm) == [("accounts", "1", "retrying", "23502")]
    pair.crm.execute("alter table accounts add column city text not null default 'Ulm'")
    installed(pair)
    pair.crm.execute("update sync.sync_failures set next_attempt_at = now()")
    sync_pair(pair)
    assert failures(pair.crm) == []
    assert equal(pair)


def retry(node: Node) -> None:
    node.execute("update sync.sync_failures set next_attempt_at = now()")


def test_a_type_widened_on_the_source_first_delays_only_what_does_not_fit_yet(
    pair: Pair, link: Link
) -> None:
    pair.crm.execute("alter table users alter column age type bigint")
    pair.crm.execute("insert into users values (2, 1, 'b@x.org', 'too large', 3000000000)")
    pair.crm.execute("insert into users values (3, 1, 'c@x.org', 'fits', 30)")
    passes.run(link)
    assert [row[0] for row in pair.billing.rows("users")] == [1, 3]
    assert failures(pair.crm) == [("users", "2", "retrying", "22003")]
    pair.billing.execute("alter table users alter column age type bigint")
    installed(pair)
    link.read_catalog()
    retry(pair.crm)
    passes.run(link)
    assert failures(pair.crm) == []
    assert equal(pair)


def test_a_type_widened_on_the_target_first_is_no_news(pair: Pair, link: Link) -> None:
    pair.billing.execute("alter table users alter column age type bigint")
    pair.crm.execute("update users set age = 40")
    passes.run(link)
    assert equal(pair)
    # What a stream does now and then.
    link.read_catalog()
    pair.crm.execute("alter table users alter column age type bigint")
    pair.crm.execute("update users set age = 3000000000")
    passes.run(link)
    assert equal(pair)


def test_a_key_widened_on_one_side_and_then_on_the_other_loses_nothing(
    pair: Pair, link: Link
) -> None:
    pair.crm.execute("alter table accounts alter column id type bigint")
    pair.crm.execute("insert into accounts values (3000000000, 'large', null, null)")
    pair.crm.execute("update accounts set name = 'two' where id = 1")
    passes.run(link)
    assert pair.billing.value("select name from accounts where id = 1") == "two"
    assert failures(pair.crm) == [("accounts", "3000000000", "retrying", "22003")]
    pair.billing.execute("alter table accounts alter column id type bigint")
    installed(pair)
    link.read_catalog()
    retry(pair.crm)
    passes.run(link)
    assert failures(pair.crm) == []
    assert equal(pair)


def test_a_label_of_an_enum_added_on_one_side_waits_for_the_other(pair: Pair) -> None:
    for node in pair.nodes:
        node.execute("create type mood as enum ('sad')")
        node.execute("create table moods (id int primary key, mood mood)")
    write_config(pair.config_path, ["moods"])
    config = installed(pair)
    with lead(config) as link:
        pair.crm.execute("alter type mood add value 'happy'")
        pair.crm.execute("insert into moods values (1, 'happy'), (2, 'sad')")
        passes.run(link)
        assert failures(pair.crm) == [("moods", "1", "retrying", "22P02")]
        assert pair.billing.rows("moods") == [(2, "sad")]
        pair.billing.execute("alter type mood add value 'happy'")
        retry(pair.crm)
        passes.run(link)
    assert equal(pair, ("moods",))


def test_a_column_that_both_have_is_synced_even_if_nobody_installs_again(
    pair: Pair, link: Link
) -> None:
    for node in pair.nodes:
        node.execute("alter table accounts add column city text not null default 'Ulm'")
    pair.crm.execute("update accounts set city = 'Bonn'")
    pair.billing.insert("accounts", id=2, name="two", city="Köln")
    link.read_catalog()
    passes.run(link)
    assert equal(pair)


def test_a_table_renamed_on_both_sides_waits_for_its_new_name_and_applications_work_on(
    pair: Pair, link: Link
) -> None:
    pair.crm.execute("insert into orders values (1, 1, 10, null)")
    for node in pair.nodes:
        node.execute("alter table orders rename to purchases")
    pair.crm.execute("truncate purchases")
    pair.crm.execute("insert into purchases values (2, 1, 20, null)")
    link.read_catalog()
    pair.crm.execute("update accounts set name = 'two'")
    passes.run(link)
    assert equal(pair, ("accounts", "users"))
    assert failures(pair.crm) == []
    [warning] = link.catalog.warnings
    assert "`crm: {table: …}`" in warning
    assert "`name` stays" in warning
    for side in link.sides.values():
        side.writer.close()
    named = {node.name: {"table": "purchases"} for node in pair.nodes}
    write_config(pair.config_path, ["accounts", "users", {"name": "orders", **named}])
    with lead(installed(pair)) as successor:
        passes.run(successor)
    assert pair.billing.rows("select id from purchases") == [(2,)]


def test_a_column_dropped_while_rows_wait_is_left_out_of_them(pair: Pair, link: Link) -> None:
    pair.crm.execute("update accounts set name = 'two', plan = 'large'")
    for node in reversed(pair.nodes):
        node.execute("alter table accounts drop column plan")
    pair.billing.insert("accounts", id=2, name="new")
    link.read_catalog()
    passes.run(link)
    assert equal(pair)


def pass_around(link: Link, source: Node, change: str) -> None:
    """Begin a pass, change a parent on its source, go on: the parents are read from the snapshot that is open."""
    with passes.interruptions(), Pass(link, source.name, "billing") as one:
        one.fetch_dependents()
        source.execute(change)
        one.process_parents()


REPLACED = """create table new_accounts (like accounts including all);
insert into new_accounts select * from accounts;
drop table accounts cascade;
alter table new_accounts rename to accounts"""


@pytest.mark.core
@pytest.mark.parametrize(
    "change",
    [
        "alter table accounts alter column plan type text using plan || '!'",
        "truncate accounts cascade",
        REPLACED,
    ],
    ids=["rewritten", "truncated", "replaced"],
)
def test_rows_that_a_snapshot_no_longer_shows_are_not_taken_for_deleted(
    pair: Pair, link: Link, change: str
) -> None:
    pair.crm.execute("update accounts set name = 'two'")
    with pytest.raises(PassInterrupted, match="accounts"):
        pass_around(link, pair.crm, change)

    assert len(pair.billing.rows("accounts")) == len(pair.billing.rows("users")) == 1
    installed(pair)
    link.read_catalog()
    while passes.run(link):
        pass
    assert equal(pair)


def test_a_rewritten_partition_is_not_taken_for_empty(pair: Pair) -> None:
    for node in pair.nodes:
        node.execute(
            """create table readings (id int primary key, value text) partition by range (id);
            create table readings_low partition of readings for values from (0) to (10)"""
        )
    write_config(pair.config_path, ["readings"])
    with lead(installed(pair)) as link:
        pair.crm.execute("insert into readings values (1, 'one')")
        passes.run(link)
        pair.crm.execute("update readings set value = 'two'")
        with pytest.raises(PassInterrupted, match="readings"):
            pass_around(
                link,
                pair.crm,
                "alter table readings alter column value type text using value || '!'",
            )
        passes.run(link)

    assert pair.billing.rows("readings") == [(1, "two!")]


def test_a_table_that_was_prepared_and_takes_the_place_of_another_is_not_taken_for_empty(
    pair: Pair, link: Link
) -> None:
    pair.crm.execute("create table new_accounts (like accounts including all)")
    pair.crm.execute("update accounts set name = 'two'")
    with pytest.raises(PassInterrupted, match="accounts"):
        pass_around(link, pair.crm, REPLACED.partition(";")[2])

    installed(pair)
    link.read_catalog()
    while passes.run(link):
        pass
    assert pair.billing.rows("select name from accounts") == [("two",)]


def test_a_partition_that_was_prepared_and_takes_the_place_of_another_is_not_taken_for_empty(
    pair: Pair,
) -> None:
    for node in pair.nodes:
        node.execute(
            """create table readings (id int primary key, value text) partition by range (id);
            create table readings_low partition of readings for values from (0) to (10);
            create table readings_new (id int primary key, value text)"""
        )
    write_config(pair.config_path, ["readings"])
    with lead(installed(pair)) as link:
        pair.crm.execute("insert into readings values (1, 'one')")
        passes.run(link)
        pair.crm.execute("update readings set value = 'two'")
        with pytest.raises(PassInterrupted, match="readings"):
            pass_around(
                link,
                pair.crm,
                """insert into readings_new select * from readings;
                alter table readings detach partition readings_low;
                alter table readings attach partition readings_new for values from (0) to (10)""",
            )
        passes.run(link)

    assert pair.billing.rows("readings") == [(1, "two")]


def test_a_value_written_as_soon_as_both_have_the_column_is_sent(pair: Pair, link: Link) -> None:
    for node in pair.nodes:
        node.execute("alter table accounts add column city text")
    installed(pair)
    pair.crm.execute("update accounts set city = 'Ulm'")
    passes.run(link)

    assert equal(pair)


def test_an_open_pass_does_not_hold_up_a_schema_change_of_what_it_has_read(
    pair: Pair, link: Link
) -> None:
    pair.crm.execute("update accounts set name = 'two'")
    with Pass(link, "crm", "billing") as one:
        one.fetch_dependents()
        one.process_parents()
        pair.crm.execute("set lock_timeout = '2s'")
        pair.crm.execute("alter table accounts alter column name set default ''")
        one.process_dependents()
    assert equal(pair)


def test_a_child_is_not_taken_along_by_a_foreign_key_that_is_new(pair: Pair) -> None:
    for node in pair.nodes:
        node.execute("create table parents (id int primary key)")
        node.execute("create table children (id int primary key, parent int)")
    write_config(pair.config_path, ["parents", "children"])
    with lead(installed(pair)) as link:
        pair.crm.execute("insert into parents values (1)")
        passes.run(link)
        for node in pair.nodes:
            node.execute(
                "alter table children add foreign key (parent) references parents on delete cascade"
            )
        pair.crm.execute("delete from parents")
        pair.billing.execute("insert into children values (1, 1)")
        while any(report.did_something for report in passes.run(link)):
            pass

    assert pair.crm.rows("children") == pair.billing.rows("children") == [(1, 1)]
    assert pair.billing.rows("select kind from sync.sync_conflicts") == [("parent_deleted",)]


def test_a_value_of_a_column_that_came_with_another_table_of_the_name_is_sent(
    pair: Pair, link: Link
) -> None:
    for node in pair.nodes:
        node.execute(
            """create table copy (like orders including all, city text);
            insert into copy select * from orders;
            alter table orders rename to old_orders; alter table copy rename to orders"""
        )
    installed(pair)
    pair.crm.execute("insert into orders values (1, 1, 10, 'note', 'Ulm')")
    passes.run(link)

    assert equal(pair)


def test_a_consumer_says_that_a_table_is_not_captured(pair: Pair, link: Link) -> None:
    assert list(link.catalog.warnings) == []
    pair.crm.execute(
        "create table copy (like orders including all); "
        "alter table orders rename to old_orders; alter table copy rename to orders"
    )
    link.read_catalog()
    [warning] = link.catalog.warnings
    assert "orders: crm: triggers on public.orders are missing or disabled" in warning
    assert "sync-pipeline install" in warning
    installed(pair)
    link.read_catalog()
    assert list(link.catalog.warnings) == []


@pytest.mark.parametrize("hidden", ["billing", "crm"])
def test_a_partition_that_is_not_captured_is_told(pair: Pair, hidden: str) -> None:
    for node in pair.nodes:
        node.execute("create table readings (id int primary key) partition by range (id)")
    write_config(pair.config_path, [{"name": "readings", "source": "crm"}])
    with lead(installed(pair)) as link:
        node = pair.crm if hidden == "crm" else pair.billing
        node.execute("create table low partition of readings for values from (0) to (10)")
        link.read_catalog()
        assert any("a partition of it" in w for w in link.catalog.warnings) == (hidden == "crm")


def test_columns_that_are_altered_while_the_link_is_paused_need_no_replay(
    pair: Pair, link: Link
) -> None:
    pair.crm.execute("update accounts set plan = 'before'")
    operate.pause(link.config, link.writers)
    for number, node in enumerate(pair.nodes):
        node.execute("alter table accounts rename column plan to tariff")
        node.execute("alter table accounts add column city text")
        node.insert("accounts", id=10 + number, name=node.name, tariff="large", city="Ulm")
    operate.resume(link.config, link.writers)
    link.read_catalog()
    passes.run(link)

    assert equal(pair)
    assert pair.billing.value("select tariff from accounts where id = 1") == "before"


def test_a_consumer_says_that_triggers_are_those_of_another_configuration(pair: Pair) -> None:
    write_config(pair.config_path, [{"name": "accounts", "exclude": ["plan"]}])
    installed(pair)
    config = config_of(pair, write_config(pair.config_path, ["accounts"]))
    with lead(config) as link:
        assert [w.partition(" triggers")[0] for w in link.catalog.warnings] == [
            *("accounts: crm:", "accounts: billing:")
        ]
        installed(pair)
        link.read_catalog()
        assert list(link.catalog.warnings) == []
