"""What the soak and the random histories believe of the applications that they run."""

from concurrent.futures import ThreadPoolExecutor

from tests.clients import TRACED, Client, Effects
from tests.helpers import Node, eventually

WAITS = "select count(*) from pg_locks where not granted"


def test_a_delete_knows_the_children_whose_key_changed_while_it_waited(crm: Node) -> None:
    crm.execute(TRACED)
    done = Effects()
    one, other = (Client(crm, done, lock_timeout_seconds=20) for _ in range(2))
    one.insert("accounts", 3, 0)
    one.insert("users", 5, 3)
    one.begin()
    one.rename("users", 5, 7)

    with ThreadPoolExecutor() as pool:
        deleted = pool.submit(other.delete, "accounts", 3)
        eventually("the delete waits for the user", lambda: crm.value(WAITS) > 0)
        one.end(commits=True)
        deleted.result()

    assert crm.rows("users") == []
    assert done.written == {token for tokens in done.removed.values() for token in tokens}
    one.close()
    other.close()
