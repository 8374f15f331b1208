"""The command line. Verbs are thin: they read arguments, call one function, print."""

import logging
import sys

from . import compress, measure, probe  # noqa: F401 (they register their verbs)
from .common import app


def main() -> None:
    """Runs a verb; errors that a user can mend are one message and exit code 1."""
    for name in ("torchao", "torch.utils._pytree"):  # they complain of kernels that nothing here uses
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        app()
    except (ValueError, OSError, RuntimeError) as error:
        if "--debug" in sys.argv:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it was", file=sys.stderr)
        sys.exit(130)
