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
    from ..evaluation.plan_map import plot_plans, table_of
    from ..evaluation.table import render

    overrides = [given for given in recipes if "=" in given]
    named = [given for given in recipes if "=" not in given]
    ratios: list[float | None] = list(ratio) if ratio else [None]
    with progress_bars(as_json) as report:
        plans = [_plan(model, recipe, share, overrides, out, device, report) for recipe in named for share in ratios]
    if not plans:
        raise UsageError("map: give at least one recipe")
    print(json.dumps([asdict(one) for one in plans]) if as_json else render(table_of(plans)), end="\n" * as_json)
    if plot:
        plot_plans(plans, plot)
        print(f"plot: {plot}", file=sys.stderr)


def _plan(model: str, recipe: str, ratio: float | None, overrides: list[str], out: Path, device: str, report):
    """The plan of a recipe, its first stage at a ratio where one is given; from the config where there is no more."""
    from ..api import plan as make_plan
    from ..checkpoint.density import density
    from ..evaluation.plan_map import planned
    from ..model.named import resolve_model
    from ..model.stream import StreamedModel
    from ..recipe.load import load_recipe
    from ..run.from_config import plan_from_config

    name, loaded = Path(recipe).name.removesuffix(".yaml"), load_recipe(recipe, overrides)
    if ratio is not None:
        stage = loaded.stages[0]
        if "ratio" not in type(stage).model_fields:
            raise UsageError(f"{recipe}: stage {stage.name} has no ratio; leave out --ratio")
        overrides, name = [*overrides, f"{stage.name}.ratio={ratio}"], f"{name} {ratio:g}"
        loaded = load_recipe(recipe, overrides)
    folder = Path(model)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        meta, made, accounting = plan_from_config(folder, loaded)
        return planned(name, density(meta, made.layout), 8 * meta.stored_dtype.itemsize, accounting)
    last = make_plan(model, recipe, out, overrides, device=device, report=report).stages[-1]
    bits = 8 * StreamedModel(resolve_model(model)).stored_dtype.itemsize
    return planned(name, last.expert_bits, bits, last.accounting)
