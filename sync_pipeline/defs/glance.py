"""What a sensor asks both nodes at every tick: does anything wait, and if so, may a run start?"""

from dataclasses import dataclass

from sync_pipeline import install, locks, outbox
from sync_pipeline.config import Config
from sync_pipeline.database import connected, query, scalar
from sync_pipeline.errors import NotInstalled
from sync_pipeline.queries import get


@dataclass(frozen=True, slots=True)
class Glance:
    """What was seen: the nodes where changes wait, and what stands against applying them now, in words."""

    waiting: tuple[str, ...] = ()
    leader: str | None = None
    obstacle: str | None = None


def look(config: Config, *, always_ask_who_leads: bool = False) -> Glance:
    """Ask both nodes: one short query each while nothing waits. Raises `ConnectionFailed`."""
    waiting = []
    leader = obstacle = None
    schema = config.schema_name
    for node in config.nodes:
        with connected(node, config, "sensor") as connection:
            try:
                install.require(config, node.name, connection)
            except NotInstalled as error:
                return Glance(obstacle=str(error))
            if outbox.poll(connection, schema, floor=0)[0]:
                waiting.append(node.name)
            elif not always_ask_who_leads:
                continue
            if scalar(connection, query(get("is_paused", schema))):
                obstacle = f"{node.name} is paused; `sync-pipeline resume` ends that"
            found = locks.leader(connection, config)
            if found is not None:
                leader = f"{found} leads on {node.name}"
    return Glance(tuple(waiting), leader, obstacle)
