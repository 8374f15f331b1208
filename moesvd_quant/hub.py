"""Results on the hub."""

import re
from pathlib import Path

from .errors import UsageError

# Of a checkpoint, what says where it was made and is of no use elsewhere. The card has the figures.
LOCAL = ["run.json", "eval.json", "speed.json", "report.html", "*.lock"]


def require_push(name: str) -> None:
    """Before any work: UsageError where nothing could be pushed as `user/name`."""
    from huggingface_hub import HfApi

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UsageError(f"--push {name}: give a name of the hub, user/name")
    try:
        HfApi().whoami()
    except OSError as error:  # the hub's errors are of this kind
        raise UsageError(f"--push {name}: the hub does not know you: log in with `hf auth login` ({error})") from error


def push(folder: Path, name: str) -> str:
    """Uploads a checkpoint into the repository `user/name`, which is made, private, where there is none. Returns its
    address. UsageError where the hub refuses."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message=f"Made by moesvd_quant: {folder.name}",
            ignore_patterns=LOCAL,
        )
    except OSError as error:
        whole = f"The checkpoint is whole, in {folder}; the same command tries again"
        raise UsageError(f"--push {name}: {error}. {whole}") from error
    return str(address)
