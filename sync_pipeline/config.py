"""The configuration: `load` reads a file, `parse` a text; both report all that is wrong in one `ConfigurationError`.

The values are in `config_values`, the reading of a file in `config_file`; import all of it from here.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from sync_pipeline.config_checks import POLICIES, TABLE_OPTIONS, fault_in_condition
from sync_pipeline.config_file import Reading
from sync_pipeline.config_values import (
    Config,
    FrozenMap,
    NodeConfig,
    RetryConfig,
    SideConfig,
    TableConfig,
)
from sync_pipeline.errors import ConfigurationError

__all__ = [
    "POLICIES",
    "TABLE_OPTIONS",
    "Config",
    "FrozenMap",
    "NodeConfig",
    "RetryConfig",
    "SideConfig",
    "TableConfig",
    "fault_in_condition",
    "load",
    "parse",
]

DEFAULT_PATH = "sync.yaml"
PATH_VARIABLE = "SYNC_CONFIG"


def load(path: Path | str | None = None, environ: Mapping[str, str] = os.environ) -> Config:
    """Read the file at `path`, else at `$SYNC_CONFIG`, else `./sync.yaml`."""
    file = Path(path or environ.get(PATH_VARIABLE) or DEFAULT_PATH)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        problem = "does not exist"
        remedy = f"copy sync.example.yaml there, or name another with --config or ${PATH_VARIABLE}"
    except UnicodeDecodeError as error:
        problem, remedy = f"is not UTF-8 at byte {error.start}", "save it as UTF-8"
    except OSError as error:
        problem, remedy = f"cannot be read: {error.strerror}", "check the path and its permissions"
    except ValueError:
        problem, remedy = "is not a path", "check it for NUL characters"
    else:
        return parse(text, environ, file=str(file), path=file)
    # Outside the handlers, so that no traceback shows what was read.
    raise ConfigurationError(problem, file=str(file), remedy=remedy)


def parse(
    text: str,
    environ: Mapping[str, str] = os.environ,
    *,
    file: str = DEFAULT_PATH,
    path: Path | None = None,
) -> Config:
    """Read the text of a configuration file; `file` is its name in messages."""
    reading = Reading(text, environ, file)
    config = reading.config(path)
    if reading.problems or config is None:
        raise ConfigurationError.of(reading.sorted_problems())
    return config
