import pytest
from tests.integration.test_scratch import *
from tests.integration.test_batches import filled, FAMILY

def test_s1(pair: Pair) -> None:
    filled(pair, batch_size=100)
    pair.billing.execute("alter table children add check (word <> 'bad')")
    pair.crm.execute("update children set parent = 2, word = 'bad' where id = 1")
    pair.crm.execute("delete from children where id = 2")
    pair.crm.execute("delete from parents where id = 1")
    sync_pair(pair)
    print(both(pair, "select * from children order by 1"), both(pair, "select * from parents order by 1"), both(pair, "select * from sync.sync_conflicts"))
    print(both(pair, "select table_name, record_id, state, error_class from sync.sync_failures"))
    assert pair.crm.rows("select parent, word from children where id = 1") == [(2, "bad")]

def test_s2_backfill(pair: Pair) -> None:
    installed(pair)
    pair.crm.insert("accounts", id=1, name="one")
    sync_pair(pair)
    pair.billing.execute("update accounts set name = 'newer'")
    pair.crm.execute("insert into sync.sync_events (table_name, record_id, event_type) values ('accounts', '1', 'update')")
    sync_pair(pair)
    print(both(pair, "select name from accounts"), both(pair, "select * from sync.sync_conflicts"))
    assert pair.crm.rows("select name from accounts") == [("newer",)]

def test_s3_keyed_by_numeric_text(pair: Pair, monkeypatch) -> None:
    from sync_pipeline import companions
    monkeypatch.setattr(companions, "count", lambda: range(20))
    ddl = """create table parents (id int primary key, code {0} unique);
    create table children (id int primary key, code {0} references parents (code))"""
    link(pair, (ddl.format("numeric"), ddl.format("text")), "parents", "children")
    pair.crm.execute("insert into parents values (1, 1)")
    pair.crm.execute("truncate sync.sync_events")
    pair.crm.execute("insert into children values (1, 1.0)")
    sync_pair(pair)
    print(failures(pair.crm))

@pytest.mark.parametrize("policy", ["last_update_wins", "crm", "billing", "hold"])
def test_s4_rowlevel(pair: Pair, policy) -> None:
    # T's app deletes parent while S moves child to it, small batches
    filled(pair, batch_size=1, policy=policy)
    pair.billing.execute("delete from children where parent = 3")
    pair.billing.execute("delete from parents where id = 3")
    pair.crm.execute("update children set parent = 3 where id in (1, 2)")
    pair.crm.execute("update parents set name = 'x' where id = 3")
    pair.crm.execute("delete from parents where id = 1")
    sync_pair(pair)
    print(both(pair, "select * from children order by 1"), both(pair, "select * from parents order by 1"), both(pair, "select record_id, table_name, kind, winner from sync.sync_conflicts"))
    print(both(pair, "select table_name, record_id, state, error_class from sync.sync_failures"))
    assert equal(pair, ("children", "parents")) or policy == "hold"
