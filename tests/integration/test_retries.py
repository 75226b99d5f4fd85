"""A record that failed and is tried again."""

import pytest

from sync_pipeline import snapshot
from sync_pipeline.link import lead
from tests.engine import equal, installed, sync_pair, totals
from tests.helpers import Pair
from tests.shapes import failures, link

pytestmark = pytest.mark.core


@pytest.mark.parametrize("batch_size", [10_000, 3])
def test_a_failure_that_is_due_while_its_record_has_an_event_is_one_record(
    pair: Pair, batch_size: int
) -> None:
    pair.config_path.write_text(f"{pair.config_path.read_text()}batch_size: {batch_size}\n")
    installed(pair)
    pair.billing.execute("alter table users add constraint adult check (age >= 18)")
    pair.crm.insert("accounts", id=1, name="one")
    for number in range(5):
        pair.crm.insert("users", id=number, account_id=1, email=f"{number}@x.org", age=number)
    sync_pair(pair)
    assert pair.crm.value("select count(*) from sync.sync_failures") == 5

    pair.crm.execute("update users set age = 30 where id > 1")
    pair.crm.execute("update users set name = 'still a child' where id = 1")
    pair.crm.execute("delete from users where id = 0")
    pair.crm.execute("update sync.sync_failures set next_attempt_at = now()")
    sync_pair(pair)
    assert pair.billing.rows("select id from users order by id") == [(2,), (3,), (4,)]
    assert pair.crm.rows("select record_id, attempts from sync.sync_failures") == [("1", 2)]

    pair.crm.execute("update users set age = 30 where id = 1")
    sync_pair(pair)
    assert equal(pair)
    assert pair.crm.rows("sync.sync_failures") == []


def test_more_failures_than_a_pass_takes_are_retried_by_the_next(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(pair)
    pair.billing.execute("alter table accounts add constraint short check (length(name) < 3)")
    for number in range(5):
        pair.crm.insert("accounts", id=number, name="long")
    sync_pair(pair)
    pair.billing.execute("alter table accounts drop constraint short")
    pair.crm.execute("update sync.sync_failures set next_attempt_at = now()")
    monkeypatch.setattr(snapshot, "MOST_RETRIES", 2)
    assert totals(pair).passes == 3
    assert equal(pair)
    assert pair.crm.rows("sync.sync_failures") == []


def test_a_dead_failure_of_a_trigger_that_misses_a_table_is_not_revived(pair: Pair) -> None:
    pair.config_path.write_text(f"{pair.config_path.read_text()}retry: {{max_attempts: 1}}\n")
    config = installed(pair)
    pair.billing.execute(
        """create function careless() returns trigger language plpgsql as
            $$ begin perform count(*) from forgotten; return new; end $$;
        create trigger careless before insert on accounts for each row execute function careless()"""
    )
    pair.crm.insert("accounts", id=1, name="one")
    sync_pair(pair)
    with lead(config):
        states = "select record_id, state, error_class from sync.sync_failures"
        assert pair.crm.rows(states) == [("1", "dead", "42P01")]


def test_records_that_need_each_other_are_tried_together_again(pair: Pair) -> None:
    link(
        pair,
        """create table lines (entry int, number int, amount int not null, primary key (entry, number));
        create function balanced() returns trigger language plpgsql as $$
        begin
            if (select sum(amount) from lines where entry = new.entry) <> 0 then
                raise exception 'not balanced' using errcode = '23514';
            end if;
            return null;
        end $$;
        create constraint trigger balanced after insert or update on lines
            deferrable initially deferred for each row execute function balanced()""",
        "lines",
    )
    pair.billing.execute("alter table lines add check (amount < 1000)")
    with pair.crm.connection.transaction():
        pair.crm.execute(
            """insert into lines select entry, number, case number when 1 then entry * 100 else -entry * 100 end
            from generate_series(1, 20) as entry, generate_series(1, 2) as number"""
        )
    for _ in range(4):
        sync_pair(pair)
        # As if the time had come for the one that is due first.
        pair.crm.execute(
            """update sync.sync_failures set next_attempt_at = next_attempt_at - (
                select min(next_attempt_at) - clock_timestamp() from sync.sync_failures
            )"""
        )
    assert pair.billing.value("select count(*) from lines") == 18
    assert {key for _, key, _, _ in failures(pair.crm)} == {
        f'["{entry}", "{number}"]' for entry in range(10, 21) for number in (1, 2)
    }
