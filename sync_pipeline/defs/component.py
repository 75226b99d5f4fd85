"""The link as a component, for projects that declare their definitions in `defs.yaml`."""

import dagster as dg
from pydantic import Field

from sync_pipeline.config import load
from sync_pipeline.defs.build import build_sync_definitions
from sync_pipeline.defs.checks import DEFAULT_LAG_SECONDS
from sync_pipeline.defs.streaming import DEFAULT_BUDGET_SECONDS


class SyncComponent(dg.Component, dg.Model, dg.Resolvable):
    """Two PostgreSQL databases kept equal in both directions, as a `sync.yaml` describes them.

    `config` is the path of that file, relative to the `defs.yaml`; `name` sets several links apart.
    """

    config: str = "sync.yaml"
    name: str | None = None
    stream_seconds: float = DEFAULT_BUDGET_SECONDS
    lag_seconds: float = DEFAULT_LAG_SECONDS
    owners: list[str] = Field(default_factory=list)

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        """Return what `build_sync_definitions` makes of the file."""
        return build_sync_definitions(
            load(context.path / self.config),
            name=self.name,
            stream_seconds=self.stream_seconds,
            lag_seconds=self.lag_seconds,
            owners=self.owners,
        )
