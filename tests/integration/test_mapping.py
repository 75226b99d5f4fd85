"""What `sync.yaml` says about a table: other names, excluded columns, one way only, a condition on what is sent."""

import pytest

from tests.engine import sync_pair, totals
from tests.helpers import Pair
from tests.shapes import converge, failures, link, marked, texts

INVOICES = {
    "name": "invoices",
    "crm": {"table": "sales.invoices", "columns": {"amount": "total", "account": "account_id"}},
    "billing": {"table": ["billing", "invoice"], "columns": {"id": "number"}},
    "exclude": ["internal_note"],
}
ACCOUNTS = {"name": "accounts", "billing": {"table": "billing.customer", "columns": {"id": "no"}}}
CRM = """
create schema sales;
create table customers_of_crm (id int);
drop table orders, users, accounts cascade;
create table accounts (id int primary key, name text);
create table sales.invoices (id int primary key, total numeric, account_id int references accounts,
    internal_note text);
"""
BILLING = """
create schema billing;
create table billing.customer (name text, no int primary key);
create table billing.invoice (account int references billing.customer, number int primary key,
    internal_note text default 'mine', amount numeric unique);
"""


@pytest.mark.core
def test_other_table_and_column_names_meet(pair: Pair) -> None:
    link(pair, (CRM, BILLING), INVOICES, ACCOUNTS)
    pair.crm.execute("insert into accounts values (1, 'Ann')")
    pair.crm.execute("insert into sales.invoices values (7, 1.50, 1, 'secret')")
    assert marked(pair.crm) == [("accounts", "1"), ("invoices", "7")]
    sync_pair(pair)
    assert texts(pair.billing, "billing.invoice") == ["(1,7,mine,1.50)"]
    pair.billing.execute("update billing.invoice set amount = 2.5, internal_note = 'still mine'")
    pair.billing.execute("insert into billing.customer values ('Bob', 2)")
    pair.billing.execute("insert into billing.invoice values (2, 8, 'x', 3)")
    sync_pair(pair)
    assert texts(pair.crm, "sales.invoices") == ["(7,2.5,1,secret)", "(8,3,2,)"]
    assert texts(pair.crm, "accounts") == ["(1,Ann)", "(2,Bob)"]
    pair.crm.execute("delete from sales.invoices; delete from accounts")
    sync_pair(pair)
    assert texts(pair.billing, "billing.invoice") == texts(pair.billing, "billing.customer") == []


def test_a_mapped_field_is_not_read_from_a_column_that_has_its_name(pair: Pair) -> None:
    crm = "create table t (id int primary key, phase text, state text)"
    billing = "create table t (id int primary key, state text)"
    link(pair, (crm, billing), {"name": "t", "crm": {"columns": {"state": "phase"}}})
    pair.crm.execute("insert into t values (1, 'sent', 'kept')")
    sync_pair(pair)
    assert texts(pair.billing, "t") == ["(1,sent)"]


def test_a_conflict_of_mapped_tables_is_logged_by_field(pair: Pair) -> None:
    link(pair, (CRM, BILLING), INVOICES, ACCOUNTS)
    pair.crm.execute("insert into sales.invoices values (7, 1, null, 'secret')")
    sync_pair(pair)
    pair.crm.execute("update sales.invoices set total = 2")
    pair.billing.execute("update billing.invoice set amount = 3")
    sync_pair(pair)
    assert pair.crm.rows("select total, internal_note from sales.invoices") == [(3, "secret")]
    (logged,) = pair.billing.rows("select local_row, remote_row from sync.sync_conflicts")
    assert logged == (
        {"id": 7, "amount": "3", "account": None},
        {"id": 7, "amount": "2", "account": None},
    )


@pytest.mark.core
def test_a_one_way_table_sends_from_its_source_alone(pair: Pair) -> None:
    link(
        pair,
        "create table prices (id int primary key, price int)",
        {"name": "prices", "source": "billing"},
    )
    pair.billing.execute("insert into prices values (1, 10), (2, 20)")
    converge(pair, "prices")
    pair.crm.execute("update prices set price = 99 where id = 1")
    pair.crm.execute("delete from prices where id = 2")
    pair.crm.execute("insert into prices values (3, 30)")
    assert marked(pair.crm) == []
    sync_pair(pair)
    assert texts(pair.billing, "prices") == ["(1,10)", "(2,20)"]
    # What the source changes next is written over the local change, without a conflict.
    pair.billing.execute("update prices set price = price + 1")
    sync_pair(pair)
    assert texts(pair.crm, "prices") == ["(1,11)", "(2,21)", "(3,30)"]
    assert pair.crm.rows("select * from sync.sync_conflicts") == []


def test_an_event_by_hand_on_the_wrong_side_of_a_one_way_table_is_set_aside(pair: Pair) -> None:
    link(
        pair,
        "create table prices (id int primary key, price int)",
        {"name": "prices", "source": "billing"},
    )
    pair.crm.execute("insert into prices values (1, 99)")
    pair.crm.execute(
        "insert into sync.sync_events (table_name, record_id, event_type) values ('prices', '1', 'insert')"
    )
    sync_pair(pair)
    assert texts(pair.billing, "prices") == []
    (failure,) = failures(pair.crm)
    assert "is synced from crm" in failure[3]


DRAFTS = {"name": "orders_", "where": {"crm": "state <> 'draft' and note not like '%hidden{}%'"}}
ORDERS = "create table orders_ (id int primary key, state text, note text default '')"


@pytest.mark.core
def test_rows_outside_the_condition_of_their_node_are_not_sent_from_there(pair: Pair) -> None:
    link(pair, ORDERS, DRAFTS)
    pair.crm.execute(
        "insert into orders_ values (1, 'draft', ''), (2, 'open', ''), (3, null, ''), (4, 'open', 'a hidden{} b')"
    )
    # The condition is crm's; billing sends all it has.
    pair.billing.execute("insert into orders_ values (5, 'draft')")
    sync_pair(pair)
    assert texts(pair.billing, "orders_") == ['(2,open,"")', '(5,draft,"")']
    assert len(texts(pair.crm, "orders_")) == 5
    assert marked(pair.crm) == failures(pair.crm) == []


def test_a_row_that_enters_the_condition_is_sent_and_one_that_leaves_stays_as_it_was(
    pair: Pair,
) -> None:
    link(pair, ORDERS, DRAFTS)
    pair.crm.execute("insert into orders_ values (1, 'draft', 'one'), (2, 'open', 'two')")
    sync_pair(pair)
    pair.crm.execute(
        "update orders_ set state = case state when 'open' then 'draft' else 'open' end"
    )
    sync_pair(pair)
    assert texts(pair.billing, "orders_") == ["(1,open,one)", "(2,open,two)"]
    pair.crm.execute("update orders_ set note = 'unsent' where id = 2")
    sync_pair(pair)
    assert texts(pair.billing, "orders_") == ["(1,open,one)", "(2,open,two)"]
    pair.crm.execute("update orders_ set state = 'open' where id = 2")
    converge(pair, "orders_")
    assert texts(pair.billing, "orders_") == ["(1,open,one)", "(2,open,unsent)"]


def test_a_delete_is_sent_whatever_the_condition_says(pair: Pair) -> None:
    link(pair, ORDERS, DRAFTS)
    pair.crm.execute("insert into orders_ values (1, 'open'), (2, 'draft')")
    sync_pair(pair)
    pair.crm.execute("update orders_ set state = 'draft'")
    pair.crm.execute("delete from orders_")
    converge(pair, "orders_")
    assert texts(pair.billing, "orders_") == []


def test_a_change_from_the_other_side_reaches_a_row_outside_the_condition(pair: Pair) -> None:
    link(pair, ORDERS, DRAFTS)
    pair.crm.execute("insert into orders_ values (1, 'open', 'first')")
    sync_pair(pair)
    pair.crm.execute("update orders_ set state = 'draft', note = 'crm'")
    sync_pair(pair)
    pair.billing.execute("update orders_ set note = 'billing'")
    converge(pair, "orders_")
    assert texts(pair.crm, "orders_") == ["(1,open,billing)"]


def test_a_child_whose_parent_is_outside_the_condition_fails_until_the_parent_enters(
    pair: Pair,
) -> None:
    link(
        pair,
        ORDERS + "; create table lines (id int primary key, of int references orders_)",
        DRAFTS,
        "lines",
    )
    pair.crm.execute("insert into orders_ values (1, 'draft'); insert into lines values (1, 1)")
    totals(pair)
    assert texts(pair.billing, "orders_") == texts(pair.billing, "lines") == []
    assert [row[:3] for row in failures(pair.crm)] == [("lines", "1", "23503")]
    pair.crm.execute("update orders_ set state = 'open'")
    pair.crm.execute("update sync.sync_failures set next_attempt_at = now()")
    converge(pair, "orders_", "lines")
    assert texts(pair.billing, "lines") == ["(1,1)"]


def test_an_excluded_column_gets_its_default_and_is_never_written_again(pair: Pair) -> None:
    link(
        pair,
        "create table t (id int primary key, word text, secret text not null default 'own')",
        {"name": "t", "exclude": ["secret"]},
    )
    pair.crm.execute("insert into t values (1, 'a', 'of crm')")
    sync_pair(pair)
    assert texts(pair.billing, "t") == ["(1,a,own)"]
    pair.billing.execute("update t set secret = 'of billing'")
    pair.crm.execute("update t set word = 'b', secret = 'new'")
    sync_pair(pair)
    assert texts(pair.billing, "t") == ['(1,b,"of billing")']
    assert texts(pair.crm, "t") == ["(1,b,new)"]
