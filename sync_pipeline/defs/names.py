"""What the parts of a link are called in Dagster."""

from collections.abc import Iterator
from dataclasses import dataclass

import dagster as dg

from sync_pipeline.config import Config

# On every run of a link's jobs, so that the run list can be filtered by it.
LINK_TAG = "sync/link"


@dataclass(frozen=True, slots=True)
class Names:
    """The names of one link's jobs, sensors and assets; `link` sets several links of a code location apart."""

    config: Config
    link: str | None = None

    def of(self, noun: str) -> str:
        """Return the name of a job, a sensor or an op of this link alone."""
        return f"{self.link}_{noun}" if self.link else noun

    @property
    def tags(self) -> dict[str, str]:
        """The tags of every run of this link, which tell it from links of other code locations."""
        nodes = "-".join(node.name for node in self.config.nodes)
        schema = self.config.schema_name
        # Links that share their databases have a schema each.
        return {LINK_TAG: self.link or (nodes if schema == "sync" else f"{nodes}/{schema}")}

    @property
    def directions(self) -> dict[str, tuple[str, str]]:
        """Source and target by the name of the direction's sub-graph: `crm_to_billing`."""
        return {
            f"{source.name}_to_{target.name}": (source.name, target.name)
            for source, target in self.config.directions
        }

    def node_asset(self, node: str, table: str) -> dg.AssetKey:
        """The table on a node: `crm/users`."""
        return dg.AssetKey([*self._prefix, node, *table.split(".")])

    def link_asset(self, table: str) -> dg.AssetKey:
        """The table over both nodes: `sync/users`; `link/users` where a node is called `sync`."""
        taken = any(node.name == "sync" for node in self.config.nodes)
        return dg.AssetKey([*self._prefix, "link" if taken else "sync", *table.split(".")])

    def link_assets(self) -> Iterator[tuple[str, dg.AssetKey]]:
        """Every synced table with its key over both nodes."""
        for table in self.config.tables:
            yield table.name, self.link_asset(table.name)

    def assets(self) -> Iterator[dg.AssetKey]:
        """All assets of the link: every table on each node, and over both."""
        for table, key in self.link_assets():
            yield from (self.node_asset(node.name, table) for node in self.config.nodes)
            yield key

    @property
    def _prefix(self) -> tuple[str, ...]:
        return (self.link,) if self.link else ()
