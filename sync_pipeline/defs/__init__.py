"""The pipeline as Dagster runs and shows it."""

from sync_pipeline.defs.build import build_sync_definitions

__all__ = ["build_sync_definitions"]
