"""Models and devices by the names that users give them."""

from pathlib import Path

from ..errors import UsageError


def resolve_model(name: str | None) -> Path:
    """Folder of a model: a local path, `reference` for the embedded one, or a hub name that is in the cache
    or can be downloaded (`name@revision`). UsageError where there is none."""
    if not name:
        raise UsageError("no model: give --model FOLDER, or `model:` in the recipe")
    if name == "reference":
        from ..reference import path

        return path()
    hub_name = not name.startswith((".", "/", "~")) and name.count("/") == 1
    if Path(name).is_dir() and not (hub_name and not is_model(Path(name))):
        return Path(name)
    if not hub_name:
        raise UsageError(f"{name}: no such folder")
    return _from_hub(name)


def is_model(folder: Path) -> bool:
    """Whether a folder holds a model, rather than having a name like one of the hub's."""
    return (folder / "config.json").is_file() or any(folder.glob("*.safetensors"))


def _from_hub(name: str) -> Path:
    """Config, tokenizer and all else that a model is described by, then one copy of its weights."""
    from huggingface_hub import HfApi, snapshot_download

    from .carried import wanted_from_hub, weights_from_hub

    repository, _, given = name.partition("@")
    revision = given or None
    try:
        try:
            names = HfApi().list_repo_files(repository, revision=revision)
        except Exception:  # no network: what is in the cache has to do
            return Path(snapshot_download(repository, revision=revision, local_files_only=True))
        described = wanted_from_hub(names)
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=described))
        everything = described + weights_from_hub(folder, names)
        return Path(snapshot_download(repository, revision=revision, allow_patterns=everything))
    except Exception as error:  # the hub's many network errors
        raise UsageError(f"{name}: no such folder, and it cannot be had from the hub: {error}") from error


def resolve_device(name: str) -> str:
    """A device of torch; UsageError where this machine does not have it."""
    import torch  # the command line answers without it

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: cannot be used here: {error}") from error
    return name
