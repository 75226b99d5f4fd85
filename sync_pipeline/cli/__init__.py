"""The command line: it parses, calls one function, and shows what that returned. Nothing is decided here.

Results go to stdout, everything else to stderr. With `--json` stdout holds exactly one JSON document.
"""

import sys

try:
    from sync_pipeline.cli import export, init, keep, mark, run, set_up, watch
    from sync_pipeline.cli.app import app, main
except KeyboardInterrupt:
    # The imports take a moment, and Ctrl-C then is no bug to be shown with a traceback.
    sys.exit(130)

# The order of the commands in `--help`.
for commands in (init, set_up, run, watch, export, keep, mark):
    commands.register(app)

__all__ = ["app", "main"]
