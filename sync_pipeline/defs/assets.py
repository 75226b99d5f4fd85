"""The synced tables as assets: `crm/users` and `billing/users`, and `sync/users` over both.

External assets: Dagster shows them and what is known of them, it does not make them. The graph must have no cycle, so
neither node depends on the other; the asset over both stands for "equal on both nodes".
"""

from collections.abc import Iterator, Sequence
from datetime import timedelta

import dagster as dg

from sync_pipeline.config import TableConfig
from sync_pipeline.defs.names import Names

FRESH = dg.FreshnessPolicy.time_window(
    warn_window=timedelta(minutes=20), fail_window=timedelta(minutes=30)
)


def asset_specs(names: Names, owners: Sequence[str] = ()) -> list[dg.AssetSpec]:
    """Return the three assets of every table, with their lineage."""
    return [
        spec
        for table in names.config.tables
        for spec in (*_node_specs(names, table, owners), _link_spec(names, table, owners))
    ]


def _node_specs(names: Names, table: TableConfig, owners: Sequence[str]) -> Iterator[dg.AssetSpec]:
    for node in names.config.nodes:
        schema, relation = table.relation(node.name)
        yield dg.AssetSpec(
            names.node_asset(node.name, table.name),
            description=f"Table {table.name} on {node.name}: what waits there and what failed.",
            group_name=names.of("sync"),
            kinds={"postgres", "table"},
            owners=owners,
            metadata={
                "node": node.name,
                "relation": f"{schema}.{relation}" if schema else relation,
                "sends_changes": table.sends(node.name),
            },
        )


def _link_spec(names: Names, table: TableConfig, owners: Sequence[str]) -> dg.AssetSpec:
    return dg.AssetSpec(
        names.link_asset(table.name),
        deps=[names.node_asset(node.name, table.name) for node in names.config.nodes],
        description=(
            f"Table {table.name} over both nodes. It is materialized while nothing of it waits for long, and observed"
            " when passes change it."
        ),
        group_name=names.of("sync"),
        kinds={"postgres"},
        owners=owners,
        freshness_policy=FRESH,
        metadata={
            "direction": f"from {table.source}" if table.source else "both ways",
            "conflicts": table.policy,
        },
    )
