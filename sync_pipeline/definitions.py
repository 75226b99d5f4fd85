"""The code location of `workspace.yaml`: the link that $SYNC_CONFIG, else ./sync.yaml, describes.

For a link of your own making, call `sync_pipeline.defs.build_sync_definitions`.
"""

import dagster as dg

from sync_pipeline.config import load
from sync_pipeline.defs import build_sync_definitions


@dg.definitions
def defs() -> dg.Definitions:
    """Read the configuration; a wrong or missing file is the error that the code location shows."""
    return build_sync_definitions(load())
