"""Watch from elsewhere: `metrics`, and what `stream --metrics-port` serves."""

from typing import Annotated

import typer

from sync_pipeline import config as configuration
from sync_pipeline.cli import show
from sync_pipeline.cli.app import ConfigOption, JsonOption, example
from sync_pipeline.cli.signals import stopped_by_signals
from sync_pipeline.cli.watch import PANEL

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 9187


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command(rich_help_panel=PANEL, epilog=example("metrics --port 9187"))(metrics)


def metrics(
    config: ConfigOption = None,
    as_json: JsonOption = False,
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Listen on this port; 0: a free one.")
    ] = DEFAULT_PORT,
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Listen on this address; no login.")
    ] = DEFAULT_HOST,
    once: Annotated[
        bool, typer.Option("--once", help="Print the metrics once instead of serving them.")
    ] = False,
) -> None:
    """Serve what both nodes hold as metrics for Prometheus, until stopped; no consumer is needed.

    Both nodes are asked at each scrape. With --json they are asked once.
    """
    from prometheus_client import generate_latest

    from sync_pipeline import metrics as exposition

    registry = exposition.registry(configuration.load(config))
    if as_json:
        show.document(
            {
                "metrics": [
                    {
                        "name": family.name,
                        "type": family.type,
                        "samples": [
                            {"name": sample.name, "labels": sample.labels, "value": sample.value}
                            for sample in family.samples
                        ],
                    }
                    for family in registry.collect()
                ]
            }
        )
    elif once:
        show.say(generate_latest(registry).decode().rstrip())
    else:
        with (
            stopped_by_signals() as stop,
            exposition.served(registry, host, port) as address,
        ):
            show.say(f"metrics: {address}")
            stop.wait()
