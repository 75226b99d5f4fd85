"""Verbs of the engine for tests: install, sync, compare."""

from pathlib import Path
from typing import Any

from sync_pipeline import install, resolution, stream, verify
from sync_pipeline.config import Config, load
from sync_pipeline.database import connected
from sync_pipeline.stream import Totals
from sync_pipeline.verify import TableReport, VerifyReport
from tests.helpers import TABLES, Pair


def config_of(pair: Pair, path: Path | None = None) -> Config:
    """The pair's configuration, read as the program reads it."""
    return load(path or pair.config_path, pair.environment)


def installed(pair: Pair, path: Path | None = None) -> Config:
    """Install the pipeline on both nodes and return the configuration."""
    config = config_of(pair, path)
    _install(config)
    return config


def confirm(config: Config) -> list[install.Step]:
    """Confirm that the databases are the nodes'."""
    return _install(config, confirm_identity=True)


def _install(config: Config, *, confirm_identity: bool = False) -> list[install.Step]:
    with (
        connected(config.first, config, "install") as one,
        connected(config.second, config, "install") as two,
    ):
        connections = {config.first.name: one, config.second.name: two}
        return install.install(config, connections, confirm_identity=confirm_identity)


def totals(pair: Pair) -> Totals:
    """Sync until nothing is pending; return what was done."""
    return stream.sync(config_of(pair))


def sync_pair(pair: Pair) -> None:
    """Sync until nothing is pending."""
    totals(pair)


def resolve(config: Config, number: int, winner: str) -> None:
    """Decide a logged conflict as an operator does."""
    with connected(config.first, config, "t") as one, connected(config.second, config, "t") as two:
        connections = {config.first.name: one, config.second.name: two}
        resolution.resolve(config, connections, number, winner)


def equal(pair: Pair, tables: tuple[str, ...] = TABLES) -> bool:
    """True when the tables hold the same rows on both nodes; prints what differs."""
    same = True
    for table in tables:
        crm, billing = (
            set(map(repr, pair.crm.rows(table))),
            set(map(repr, pair.billing.rows(table))),
        )
        if crm != billing:
            same = False
            print(
                f"{table}: only crm {sorted(crm - billing)[:5]}, only billing {sorted(billing - crm)[:5]}"
            )
    return same


def verified(pair: Pair, *tables: str) -> VerifyReport:
    """Compare both nodes."""
    config = config_of(pair)
    with (
        connected(config.first, config, "verify") as crm,
        connected(config.second, config, "verify") as billing,
    ):
        return verify.verify(config, {"crm": crm, "billing": billing}, tables or None)


def repaired(pair: Pair, from_node: str, *tables: str, dry_run: bool = False) -> int:
    """Compare, and mark on a node what differs; return how many records that are."""
    config = config_of(pair)
    with (
        connected(config.first, config, "verify") as crm,
        connected(config.second, config, "verify") as billing,
    ):
        connections = {"crm": crm, "billing": billing}
        report = verify.verify(config, connections, tables or None)
        return verify.repair(config, connections, report, from_node, dry_run=dry_run)


def accused(table: TableReport) -> dict[str, Any]:
    """What is reported, without the empty lists."""
    found = {f"missing on {node}": sorted(ids) for node, ids in table.missing.items() if ids}
    return found | ({"different": sorted(table.different)} if table.different else {})
