"""The verb map: plans side by side."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from .common import Device, Json, Out, app, progress_bars


@app.command("map")
def map_plans(
    model: Annotated[str, typer.Argument(help="Folder, hub name, or `reference`; a config.json is enough for some.")],
    recipes: Annotated[list[str], typer.Argument(help="Shipped names or YAML files; and key=value, for all of them.")],
    ratio: Annotated[list[float] | None, typer.Option(help="Each recipe at this ratio; repeat it.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw layers over plans, and memory, into this PNG.")] = None,
    out: Out = Path("out"),
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """What recipes, or one at several ratios, would leave of each layer, and of memory; changes no weight."""
    overrides = [given for given in recipes if "=" in given]
    named = [given for given in recipes if "=" not in given]
    ratios: list[float | None] = list(ratio) if ratio else [None]
    if not named:
        raise UsageError("map: give at least one recipe")
    wanted = [_at_ratio(recipe, share, overrides) for recipe in named for share in ratios]
    with progress_bars(as_json) as report:
        from ..evaluation.plan_map import plot_plans, table_of
        from ..evaluation.table import render

        plans = [_plan(model, recipe, name, given, out, device, report) for recipe, name, given in wanted]
    print(json.dumps([asdict(one) for one in plans]) if as_json else render(table_of(plans)), end="\n" * as_json)
    if plot:
        plot_plans(plans, plot)
        print(f"plot: {plot}", file=sys.stderr)


def _at_ratio(recipe: str, ratio: float | None, overrides: list[str]) -> tuple[str, str, list[str]]:
    """The recipe, what its column is called, and its overrides: of the first stage's ratio, where one is given."""
    from ..recipe.load import load_recipe

    name, stage = Path(recipe).name.removesuffix(".yaml"), load_recipe(recipe, overrides).stages[0]
    if ratio is None:
        return recipe, name, overrides
    if "ratio" not in type(stage).model_fields:
        raise UsageError(f"{recipe}: stage {stage.name} has no ratio; leave out --ratio, or this recipe")
    return recipe, f"{name} {ratio:g}", [*overrides, f"{stage.name}.ratio={ratio}"]


def _plan(model: str, recipe: str, name: str, overrides: list[str], out: Path, device: str, report):
    """The plan of a recipe; from the config where there is no more."""
    from ..api import plan as make_plan
    from ..checkpoint.density import density
    from ..evaluation.plan_map import planned
    from ..model.named import resolve_model
    from ..model.stream import StreamedModel
    from ..recipe.load import load_recipe
    from ..run.from_config import plan_from_config

    folder = Path(model)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        meta, made, accounting = plan_from_config(folder, load_recipe(recipe, overrides))
        return planned(name, density(meta, made.layout), 8 * meta.stored_dtype.itemsize, accounting)
    last = make_plan(model, recipe, out, overrides, device=device, report=report).stages[-1]
    bits = 8 * StreamedModel(resolve_model(model)).stored_dtype.itemsize
    return planned(name, last.expert_bits, bits, last.accounting)
