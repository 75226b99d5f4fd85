"""Two encodings: what one node cannot store fails alone, and everything else travels."""

from collections.abc import Iterator

import pytest

from tests.engine import sync_pair
from tests.helpers import Node, Pair, encoded
from tests.shapes import converge, failures, link, texts

pytestmark = pytest.mark.core

EURO = "\u20ac"
UNTRANSLATABLE = "22P05"
INVALID = "22021"


@pytest.fixture
def latin(pair: Pair) -> Iterator[Pair]:
    """A pair of which billing knows the characters of western Europe alone, without the euro sign."""
    with encoded(pair, crm="utf8", billing="latin1") as latin:
        yield latin


def retry(node: Node) -> None:
    node.execute("update sync.sync_failures set next_attempt_at = now()")


def refused(node: Node) -> list[tuple[str, str, str]]:
    return [(table, record, error_class) for table, record, error_class, _ in failures(node)]


def test_a_character_that_the_target_cannot_store_makes_its_record_fail_alone(latin: Pair) -> None:
    link(latin, "create table notes (id int primary key, body text)", "notes")
    latin.crm.execute(
        "insert into notes values (1, %s), (2, %s), (3, null)", "gr\u00fcn", f"5 {EURO}"
    )
    sync_pair(latin)
    assert texts(latin.billing, "notes") == ["(1,gr\u00fcn)", "(3,)"]
    assert refused(latin.crm) == [("notes", "2", UNTRANSLATABLE)]
    assert latin.crm.pending() == 0
    # A conflict beside it is settled.
    latin.billing.execute("update notes set body = 'billing' where id = 1")
    latin.crm.execute("update notes set body = %s where id = 1", "\u00e9")
    latin.crm.execute("update notes set body = %s where id = 3", EURO)
    sync_pair(latin)
    assert texts(latin.billing, "notes") == ["(1,\u00e9)", "(3,)"]
    assert len(latin.billing.rows("select from sync.sync_conflicts")) == 1
    latin.crm.execute("update notes set body = replace(body, %s, 'EUR')", EURO)
    converge(latin, "notes")


def test_a_key_that_the_target_cannot_store_makes_its_record_fail_alone(latin: Pair) -> None:
    link(
        latin,
        "create table words (word text primary key); "
        "create table pairs (number int, word text references words, primary key (number, word))",
        "words",
        "pairs",
    )
    latin.crm.execute("insert into words values (%s), ('\u00fc'), ('plain')", EURO)
    latin.crm.execute("insert into pairs values (1, %s), (2, '\u00fc'), (3, 'plain')", EURO)
    sync_pair(latin)
    assert texts(latin.billing, "words") == ["(plain)", "(\u00fc)"]
    assert texts(latin.billing, "pairs") == ["(2,\u00fc)", "(3,plain)"]
    assert refused(latin.crm) == [
        ("pairs", f'["1", "{EURO}"]', UNTRANSLATABLE),
        ("words", EURO, UNTRANSLATABLE),
    ]
    latin.crm.execute("delete from pairs where number = 1")
    latin.crm.execute("delete from words where word = %s", EURO)
    converge(latin, "words", "pairs")


def test_why_a_record_failed_is_kept_where_it_comes_from_in_the_characters_that_are_there(
    latin: Pair,
) -> None:
    link(latin, "create table notes (id int primary key, body text)", "notes")
    latin.crm.execute(
        f"""create function refuse() returns trigger language plpgsql as $$ begin
        raise exception '{EURO} %', repeat(' and so on', 100); end $$;
        create trigger refuse before insert on notes for each row when (new.id = 1) execute function refuse()"""
    )
    latin.billing.execute("insert into notes values (1, 'one'), (2, 'two')")
    sync_pair(latin)
    assert texts(latin.crm, "notes") == ["(2,two)"]
    [(_, record, _, error)] = failures(latin.billing)
    assert record == "1"
    assert "and so on" in error
    latin.crm.execute("drop trigger refuse on notes")
    retry(latin.billing)
    converge(latin, "notes")


def test_bytes_that_are_no_text_make_their_record_fail_alone(pair: Pair) -> None:
    with encoded(pair, crm="sql_ascii", billing="utf8") as other:
        link(other, "create table notes (id int primary key, body text)", "notes")
        other.crm.execute("insert into notes values (1, 'one'), (2, '\u00fc')")
        other.crm.execute("insert into notes values (3, convert_from('\\xff'::bytea, 'sql_ascii'))")
        sync_pair(other)
        assert texts(other.billing, "notes") == ["(1,one)", "(2,\u00fc)"]
        assert refused(other.crm) == [("notes", "3", INVALID)]
        other.crm.execute("update notes set body = 'three' where id = 3")
        converge(other, "notes")
