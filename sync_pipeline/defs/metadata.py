"""What a pass did, as Dagster shows it: numbers for metadata, a sentence for logs. Never a row, never a key."""

from dataclasses import asdict

import dagster as dg

from sync_pipeline.records import Counts, DirectionReport


def direction_metadata(report: DirectionReport) -> dict[str, dg.MetadataValue]:
    """Return the numbers of one direction: totals and a table of counts per synced table."""
    numbers: dict[str, dg.MetadataValue] = {
        name: dg.MetadataValue.int(value) for name, value in asdict(report.total).items()
    }
    numbers["events"] = dg.MetadataValue.int(report.events)
    numbers["batches"] = dg.MetadataValue.int(report.batches)
    if report.set_aside:
        numbers["set_aside"] = dg.MetadataValue.int(report.set_aside)
    numbers["lag_seconds_before"] = dg.MetadataValue.float(round(report.lag_seconds, 3))
    if report.tables:
        numbers["tables"] = dg.MetadataValue.table(
            [
                dg.TableRecord({"table": table, **asdict(counts)})
                for table, counts in sorted(report.tables.items())
            ]
        )
    return numbers


def sentence(report: DirectionReport) -> str:
    """Say in one line what a direction did."""
    if not report.did_something:
        return f"{report.name}: nothing waited"
    return f"{report.name}: {counts_in_words(report.total)}, from {report.events} events"


def counts_in_words(counts: Counts) -> str:
    """Return `3 upserted, 1 deleted`, or `no change`."""
    words = [f"{value} {name}" for name, value in asdict(counts).items() if value]
    return ", ".join(words) or "no change"
