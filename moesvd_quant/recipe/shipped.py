"""The recipes that come with the package."""

from importlib import resources

from ..errors import did_you_mean
from .recipe import RecipeError


def shipped() -> list[tuple[str, str]]:
    """(name, first line of its comment) of every recipe of the package."""
    root = resources.files("moesvd_quant.recipes")
    found = [(f.name, f) for f in root.iterdir() if f.name.endswith(".yaml")]
    folder = root.joinpath("models")
    if folder.is_dir():
        found += [(f"models/{f.name}", f) for f in folder.iterdir() if f.name.endswith(".yaml")]
    lines = {name[: -len(".yaml")]: f.read_text().splitlines()[0].lstrip("# ") for name, f in found}
    return sorted(lines.items())


def read_shipped(name: str) -> str:
    """Text of a shipped recipe; RecipeError with the nearest names where there is none."""
    names = [n for n, _ in shipped()]
    if name not in names:
        raise RecipeError(
            f"{name}: no such recipe or file{did_you_mean(name, names)}; `moesvd ls` lists what is shipped"
        )
    return resources.files("moesvd_quant.recipes").joinpath(f"{name}.yaml").read_text()
