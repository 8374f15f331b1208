"""Models by name: where they are, and where what is measured of them goes."""

from collections.abc import Iterable
from pathlib import Path

from ..errors import UsageError


def resolve_model(name: str | None, recipe=None) -> Path:
    """Folder of a model: a local path, `reference` for the embedded one, or a hub name that is in the cache
    or can be downloaded (`name@revision`). UsageError where there is none."""
    name = name or (recipe.model if recipe else None)
    if not name:
        raise UsageError("no model: give --model FOLDER, or `model:` in the recipe")
    if name == "reference":
        from ..reference import path

        return path()
    hub_name = not name.startswith((".", "/", "~")) and name.count("/") == 1
    if Path(name).is_dir() and not (hub_name and not _is_model(Path(name))):
        return Path(name)
    if not hub_name:
        raise UsageError(f"{name}: no such folder")
    return _from_hub(name)


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() or any(folder.glob("*.safetensors"))


def _from_hub(name: str) -> Path:
    """Config, tokenizer and all else that a model is described by, then one copy of its weights."""
    from huggingface_hub import HfApi, snapshot_download

    from ..model.carried import wanted_from_hub, weights_from_hub

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


def record_places(models: dict[str, Path], out: Path | None) -> dict[str, Path]:
    """Folder for the record of each model {as it was named: its folder}. Without `out` it is the model's own, and there
    is none for what is a name and no folder. In `out` a folder for each: its last name, or as much of its path as
    tells it from the others. UsageError where one of them is the record of another model.
    """
    if out is None:
        return {given: folder for given, folder in models.items() if Path(given).is_dir() and _is_model(Path(given))}
    from ..memory.files import read_json

    places = {given: out / label for given, label in _labels(models).items()}
    for given, place in places.items():
        known = read_json(place / "eval.json").get("folder") if (place / "eval.json").is_file() else None
        if known not in (None, str(models[given].resolve())):
            raise UsageError(f"{place}: holds the record of {known}; choose another --out, or delete it")
    return places


def _labels(names: Iterable[str]) -> dict[str, str]:
    """The shortest endings of paths that tell them from each other, joined by dashes."""
    parts = {name: [part for part in Path(name).parts if part not in ("/", "..", ".")] for name in names}
    count = 1
    while True:
        labels = {name: "-".join(found[-count:]) for name, found in parts.items()}
        if len(set(labels.values())) == len(labels) or count > max(map(len, parts.values())):
            return labels
        count += 1
