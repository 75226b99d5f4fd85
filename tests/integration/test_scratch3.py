import pytest
from tests.integration.test_scratch import *
from tests.integration.test_batches import filled, FAMILY

def test_u1_hold_crash_retry(pair: Pair) -> None:
    """S: prepared transactions of events etc."""
    installed(pair)

@pytest.mark.parametrize("size", [1, 2, 100])
def test_u2_set_null_cascade_updates(pair: Pair, size) -> None:
    ddl = """create table parents (id int primary key, code text unique);
    create table children (id int primary key, code text references parents (code) on update cascade on delete set null, word text)"""
    link(pair, ddl, "parents", "children", batch_size=size)
    pair.crm.execute("insert into parents values (1,'a'),(2,'b'),(3,'c')")
    pair.crm.execute("insert into children values (1,'a',''),(2,'b',''),(3,'c','')")
    converge(pair, "parents", "children")
    pair.billing.execute("insert into children values (4,'a','t'),(5,'c','t')")
    pair.billing.execute("update children set word='t' where id in (1,3)")
    pair.crm.execute("update parents set code = 'z' where id = 1")
    pair.crm.execute("update parents set code = 'a' where id = 2")
    pair.crm.execute("delete from parents where id = 3")
    sync_pair(pair)
    print(both(pair, "select * from children order by 1"), both(pair, "select * from parents order by 1"), both(pair, "select table_name, record_id, kind, winner from sync.sync_conflicts"))
    print(both(pair, "select table_name, record_id, state, error_class, error from sync.sync_failures"))
    assert equal(pair, ("parents", "children"))

def test_u3_trigger_on_target_moves_child_in_second_batch(pair: Pair) -> None:
    pass

def test_u4_key_change_with_conflict(pair: Pair) -> None:
    link(pair, "create table t (id int primary key, w text)", {"name": "t", "conflict": "billing"}, batch_size=1)
    pair.crm.execute("insert into t values (1,'a'),(2,'b')")
    converge(pair, "t")
    pair.crm.execute("update t set id = 3 where id = 1")
    pair.billing.execute("update t set w = 'mine' where id = 1")
    sync_pair(pair)
    print(both(pair, "select * from t order by 1"), both(pair, "select table_name, record_id, kind, winner from sync.sync_conflicts"))
    assert equal(pair, ("t",))

def test_u5_conflict_row_unique_outsider(pair: Pair) -> None:
    """T wins for 2, whose unique value S's 1 takes."""
    link(pair, "create table t (id int primary key, w text unique, n int)", {"name": "t", "conflict": "billing"}, batch_size=10)
    pair.crm.execute("insert into t values (1,'a'),(2,'b')")
    converge(pair, "t")
    pair.crm.execute("update t set w = 'c' where id = 2")
    pair.crm.execute("update t set w = 'b' where id = 1")
    pair.billing.execute("update t set n = 5 where id = 2")
    sync_pair(pair)
    for _ in range(3):
        for node in pair.nodes:
            node.execute("update sync.sync_failures set next_attempt_at = now()")
        sync_pair(pair)
    print(both(pair, "select * from t order by 1"), both(pair, "select table_name, record_id, kind, winner from sync.sync_conflicts"))
    print(both(pair, "select table_name, record_id, state, error_class, error from sync.sync_failures"))

@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_u6_default_isolation(pair: Pair, level) -> None:
    for node in pair.nodes:
        node.execute(f"alter database {node.connection.info.dbname} set default_transaction_isolation = '{level}'")
        node.execute(f"alter database {node.connection.info.dbname} set default_transaction_deferrable = on")
    installed(pair)
    pair.crm.insert("accounts", id=1, name="one")
    sync_pair(pair)
    with pair.billing.connect(autocommit=False) as ahead:
        ahead.execute("update accounts set name = 'ahead' where id = 1")
        pair.crm.execute("update accounts set name = 'crm' where id = 1")
        t = threading.Timer(1.0, ahead.commit)
        t.start()
        sync_pair(pair)
        t.join()
    sync_pair(pair)
    print(both(pair, "select * from accounts order by 1"), both(pair, "select table_name, record_id, kind, winner from sync.sync_conflicts"))
    assert equal(pair)

def test_u7_set_aside_race(pair: Pair) -> None:
    children = {"name": "children", "where": {"crm": "word::int > 0"}}
    link(pair, FAMILY, children, "parents")
    pair.crm.execute("insert into parents values (1, 'a')")
    pair.crm.execute("insert into children values (1, 1, 'two')")
    from sync_pipeline import outbox
    with Point("before", outbox, "_set_aside").struck_by(lambda: bool(pair.crm.execute("update children set word = '2'"))):
        sync_pair(pair)
    print(both(pair, "select * from children"), both(pair, "select record_id, state from sync.sync_failures"))
    assert equal(pair, ("children",))
