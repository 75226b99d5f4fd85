"""Keeps two PostgreSQL databases equal in both directions.

The names below are the Python API, described in docs/api.md: they change as the version says, everything else may
change at any time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sync_pipeline.config import Config, load
    from sync_pipeline.defs.build import build_sync_definitions
    from sync_pipeline.defs.component import SyncComponent
    from sync_pipeline.errors import (
        CatalogMismatch,
        ConfigurationError,
        ConnectionFailed,
        LockTaken,
        NotInstalled,
        PassInterrupted,
        PoolerRefused,
        SyncPipelineError,
    )
    from sync_pipeline.records import Counts
    from sync_pipeline.stream import Totals, sync

# The only place of the version: the package's metadata take it from here.
__version__ = "0.1.0"

__all__ = [
    "CatalogMismatch",
    "Config",
    "ConfigurationError",
    "ConnectionFailed",
    "Counts",
    "LockTaken",
    "NotInstalled",
    "PassInterrupted",
    "PoolerRefused",
    "SyncComponent",
    "SyncPipelineError",
    "Totals",
    "__version__",
    "build_sync_definitions",
    "load",
    "sync",
]

_HOMES = {
    "Config": "config",
    "Counts": "records",
    "SyncComponent": "defs.component",
    "Totals": "stream",
    "build_sync_definitions": "defs.build",
    "load": "config",
    "sync": "stream",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is asked for: who wants no Dagster does not pay for its import."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
