"""Where what is measured of models goes."""

from collections.abc import Iterable
from pathlib import Path

from ..errors import UsageError
from ..model.named import is_model


def record_places(models: dict[str, Path], out: Path | None) -> dict[str, Path]:
    """Folder for the record of each model {as it was named: its folder}. Without `out` it is the model's own, and there
    is none for what is a name and no folder. In `out` a folder for each: its last name, or as much of its path as
    tells it from the others. UsageError where one of them is the record of another model.
    """
    if out is None:
        return {given: folder for given, folder in models.items() if Path(given).is_dir() and is_model(Path(given))}
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
