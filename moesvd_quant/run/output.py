"""The output folder of a run: one process at a time works in it, and nothing of another recipe or model is taken."""

import fcntl
from contextlib import contextmanager
from pathlib import Path

from ..errors import MoesvdError
from ..memory.files import read_json
from ..runtime.modeling_moesvd import MANIFEST


class RunError(MoesvdError, RuntimeError):
    """A run that cannot go on; the message says what is in the way and what to do."""


@contextmanager
def locked(out: Path):
    """One run per output folder: RunError where another process holds it."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{out}: another run is working here; wait for it or choose another --out") from None
        yield


def check_key(folder: Path, wanted: dict) -> None:
    """RunError where the folder of a stage holds the result of something else than `wanted`, its key."""
    if not folder.exists():
        return
    if not (folder / MANIFEST).is_file():
        raise RunError(f"{folder}: exists and is no checkpoint of ours; choose another --out")
    found = read_json(folder / MANIFEST).get("key", {})
    if changed := [k for k in wanted if found.get(k) != wanted[k]]:
        raise RunError(
            f"{folder}: was made with another {' and '.join(changed)}; choose another --out, or delete "
            "the folder to make it anew. Nothing was changed"
        )
