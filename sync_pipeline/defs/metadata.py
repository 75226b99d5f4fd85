"""What a pass did, as Dagster shows it: numbers for metadata, a sentence for logs. Never a row, never a key."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict

import dagster as dg

from sync_pipeline.defs.names import Names
from sync_pipeline.records import Counts, DirectionReport, counted

Metadata = dict[str, dg.MetadataValue]


def direction_metadata(report: DirectionReport, lag_after: float) -> Metadata:
    """Return the numbers of one direction: totals, lag, and a table of counts per synced table."""
    numbers = _numbers(report.total)
    numbers["events"] = dg.MetadataValue.int(report.events)
    numbers["batches"] = dg.MetadataValue.int(report.batches)
    numbers["lag_seconds_before"] = seconds(report.lag_seconds)
    numbers["lag_seconds_after"] = seconds(lag_after)
    if report.set_aside:
        numbers["set_aside"] = dg.MetadataValue.int(report.set_aside)
    if report.tables:
        numbers["tables"] = dg.MetadataValue.table(
            [
                dg.TableRecord({"table": table, **asdict(counts)})
                for table, counts in sorted(report.tables.items())
            ]
        )
    return numbers


def run_metadata(directions: Iterable[tuple[DirectionReport, float]]) -> dg.TableMetadataValue:
    """Return the numbers of a whole run, a record for each direction with its lag before and after."""
    return dg.MetadataValue.table(
        [
            dg.TableRecord(
                {
                    "direction": report.name,
                    **asdict(report.total),
                    "lag_seconds_before": round(report.lag_seconds, 3),
                    "lag_seconds_after": round(lag_after, 3),
                }
            )
            for report, lag_after in directions
        ]
    )


def observations(names: Names, reports: Iterable[DirectionReport]) -> Iterator[dg.AssetObservation]:
    """Yield what passes did as one observation of each table's asset over both nodes; these draw its plots."""
    tables: dict[str, tuple[Counts, float]] = {}
    for report in reports:
        for table, counts in report.tables.items():
            total, lag = tables.get(table, (Counts(), 0.0))
            total.add(counts)
            tables[table] = (total, max(lag, report.lag_seconds))
    keys = dict(names.link_assets())
    for table, (total, lag) in sorted(tables.items()):
        if table in keys and total.total:
            applied = total.upserted + total.deleted
            yield dg.AssetObservation(
                keys[table],
                description=counts_in_words(total),
                metadata={**_numbers(total), "rows": applied, "lag_seconds": seconds(lag)},
            )


def sentence(report: DirectionReport) -> str:
    """Say in one line what a direction did."""
    if not report.did_something:
        return f"{report.name}: nothing waited"
    return f"{report.name}: {counts_in_words(report.total)}, from {counted(report.events, 'event')}"


def counts_in_words(counts: Counts) -> str:
    """Return `3 upserted, 1 deleted`, or `no change`."""
    return counts.in_words() or "no change"


def seconds(value: float) -> dg.FloatMetadataValue:
    """Return a duration in seconds, to the millisecond."""
    return dg.MetadataValue.float(round(float(value), 3))


def _numbers(counts: Counts) -> Metadata:
    return {name: dg.MetadataValue.int(value) for name, value in asdict(counts).items()}
