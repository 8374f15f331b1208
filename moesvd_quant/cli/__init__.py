"""The command line. Verbs are thin: they read arguments, call one function, print."""

import errno
import sys
import traceback
from typing import Annotated

import typer

from ..errors import MoesvdError
from ..memory.allocator import disable_malloc_cache
from . import (
    bench,  # noqa: F401 (they register their verbs)
    compare,  # noqa: F401 (they register their verbs)
    compress,  # noqa: F401 (they register their verbs)
    doctor,  # noqa: F401 (they register their verbs)
    maps,  # noqa: F401 (they register their verbs)
    measure,  # noqa: F401 (they register their verbs)
    plan,  # noqa: F401 (they register their verbs)
    probe,  # noqa: F401 (they register their verbs)
    serve,  # noqa: F401 (they register their verbs)
)
from .common import app

DEFECT = "This is a defect of moesvd_quant. Please report it with the lines above."
# Errors of the system that a user can mend: no such file, no permission, no room.
MENDED_BY_USER = (
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC,
    errno.EDQUOT,
)  # fmt: skip

# How `moesvd --help` shows the verbs.
PANELS = {
    "First": ("doctor", "demo", "ls"),
    "Look ahead": ("plan", "probe", "map"),
    "Compress": ("run", "export", "validate"),
    "Use": ("chat", "serve"),
    "Measure": ("eval", "compare", "speed", "table", "report"),
    "Several recipes": ("bench", "pareto"),
    "Recipes of your own": ("cp", "schema"),
}
PANEL_OF = {verb: panel for panel, verbs in PANELS.items() for verb in verbs}


def _verb(command) -> str:
    return command.name or command.callback.__name__


app.registered_commands.sort(key=lambda command: list(PANEL_OF).index(_verb(command)))
for _command in app.registered_commands:
    _command.rich_help_panel = PANEL_OF[_verb(_command)]


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show where in the code an error arose.")] = False,
) -> None:
    """Makes Mixture-of-Experts language models small, for example: moesvd run fit budget=2.3bpw --model FOLDER"""


def main() -> None:
    """Runs a verb. Errors that a user can mend are one message and exit code 1; others end with a traceback."""
    disable_malloc_cache()  # forecasts of memory count on it
    given = [argument for argument in sys.argv[1:] if argument != "--debug"]  # before or after the verb
    debug = len(given) < len(sys.argv) - 1
    try:
        app(["--debug"] * debug + given)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it was", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        mended = isinstance(error, MoesvdError) or (isinstance(error, OSError) and error.errno in MENDED_BY_USER)
        if debug or not mended:
            traceback.print_exc()
        print(f"error: {error}" if mended else DEFECT, file=sys.stderr)
        sys.exit(1)
