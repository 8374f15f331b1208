"""The base of all errors that a user can mend."""


class MoesvdError(Exception):
    """Something that a user can mend: the message says what is wrong, where, and what to do.

    The command line turns these into one line. Any other exception is a defect of ours and ends with a traceback.
    """


class UsageError(MoesvdError, ValueError):
    """An argument, an option or a setting that cannot be used."""


class ModelError(MoesvdError, ValueError):
    """A model folder that cannot be used."""
