"""The base of all errors that a user can mend, and what their messages share."""

from collections.abc import Iterable
from difflib import get_close_matches


class MoesvdError(Exception):
    """Something that a user can mend: the message says what is wrong, where, and what to do.

    The command line turns these into one line. Any other exception is a defect of ours and ends with a traceback.
    """


class UsageError(MoesvdError, ValueError):
    """An argument, an option or a setting that cannot be used."""


class ModelError(MoesvdError, ValueError):
    """A model folder that cannot be used."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'gptq'?` with the known word nearest to one that is not; nothing where none is near."""
    found = get_close_matches(word, list(known), 1)
    return f"; did you mean {found[0]!r}?" if found else ""
