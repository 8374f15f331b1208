"""YAML -> a validated Recipe. Everything wrong with it is said at once."""

from collections.abc import Sequence
from pathlib import Path

import yaml

from .check import checked_recipe
from .places import Places
from .recipe import Recipe, RecipeError
from .shipped import read_shipped
from .yaml_lines import YamlProblem, apply_override, parse


def load_recipe(source: str | Path | dict, overrides: Sequence[str] = ()) -> Recipe:
    """A shipped name, a YAML file or the content of one, with `key=value` overrides. RecipeError names all that is
    wrong; of a content, lines are those that it has as YAML."""
    text, where, name = _text_of(source)
    try:
        content, lines = parse(text)
    except YamlProblem as problem:
        raise RecipeError(f"{where}:{problem.line}: {problem}") from problem
    if not isinstance(content, dict):
        raise RecipeError(f"{where}:1: a recipe is a mapping with the key 'stages'")
    places = Places(where, lines)
    entries = content.get("stages")
    listed = entries if isinstance(entries, list) else []
    names = [next(iter(entry)) if isinstance(entry, dict) and entry else str(entry) for entry in listed]
    for override in overrides:
        try:
            places.overrides[apply_override(content, override, names)] = override
        except (ValueError, IndexError, KeyError, TypeError) as error:
            raise RecipeError(f"override {override!r}: {error}") from error
    return checked_recipe(name, content, places)


def _text_of(source: str | Path | dict) -> tuple[str, str, str]:
    """Text of a recipe, where that stands, and the recipe's name."""
    if isinstance(source, dict):
        return yaml.safe_dump(source, sort_keys=False), "recipe", "recipe"
    path = Path(source)
    if path.suffix not in (".yaml", ".yml"):
        return read_shipped(str(source)), f"{source}.yaml", str(source)
    if not path.is_file():
        raise RecipeError(f"{path}: no such file")
    return _read(path), str(path), path.stem


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{path}:{line}: is not UTF-8 text; save the file as UTF-8") from error
