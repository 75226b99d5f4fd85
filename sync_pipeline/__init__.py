"""Keeps two PostgreSQL databases equal in both directions."""

from typing import Any

__version__ = "0.1.0"

# For Dagster's `type: sync_pipeline.SyncComponent`; nobody else pays for the import of Dagster.
_COMPONENT = "SyncComponent"


def __getattr__(name: str) -> Any:
    if name == _COMPONENT:
        from sync_pipeline.defs.component import SyncComponent  # noqa: PLC0415 - as said above

        return SyncComponent
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), _COMPONENT])
