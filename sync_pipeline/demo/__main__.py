"""`python -m sync_pipeline.demo`, and the picture of the documentation: `… --picture docs/images/demo.svg`."""

import argparse
import sys
from pathlib import Path

from sync_pipeline.demo import run

parser = argparse.ArgumentParser(prog="python -m sync_pipeline.demo", description=__doc__)
parser.add_argument("--ui", action="store_true", help="two servers and Dagster, until Ctrl-C")
parser.add_argument("--json", action="store_true", help="print one JSON document")
parser.add_argument(
    "--picture", type=Path, metavar="FILE", help="write what is shown to an SVG file"
)
arguments = parser.parse_args()
sys.exit(run(ui=arguments.ui, json_output=arguments.json, picture=arguments.picture))
