"""Verbs that make checkpoints, and those about recipes: run, plan, validate, ls, cp, export."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UsageError
from .common import (
    Device,
    Executor,
    Json,
    Memory,
    Model,
    Out,
    Overrides,
    Workers,
    app,
    print_table,
    progress_bars,
)


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="Shipped name (see `moesvd ls`) or YAML file.")],
    overrides: Overrides = None,
    model: Model = None,
    out: Out = Path("out"),
    device: Device = "auto",
    memory: Memory = None,
    workers: Workers = 1,
    executor: Executor = "processes",
    as_json: Json = False,
) -> None:
    """Run a recipe: each stage writes a checkpoint under OUT; interrupted, the same command goes on."""
    from ..api import compress

    how: Any = {"device": device, "memory": memory, "workers": workers, "executor": executor}
    with progress_bars(as_json) as report:
        made = compress(model, recipe, out, overrides or (), report=report, **how)
    records = [one.record for one in made.evaluation]
    if as_json:
        print(json.dumps({"checkpoints": list(map(str, made.checkpoints)), "evaluation": records}))
        return
    for folder in made.checkpoints:
        print(f"{folder}: {json.loads((folder / 'moesvd.json').read_text())['accounting']['disk_bytes'] / 1e6:.2f} MB")
    if records:
        print_table(records, "terminal")


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(help="Shipped name or YAML file.")],
    overrides: Overrides = None,
    model: Model = None,
    out: Out = Path("out"),
    device: Device = "auto",
    memory: Memory = None,
    workers: Workers = 1,
    executor: Executor = "processes",
    as_json: Json = False,
) -> None:
    """Forecast the bytes of every stage, exactly, memory and disk, and show what goes where; changes no weight."""
    from ..api import plan as make_plan

    how: Any = {"device": device, "memory": memory, "workers": workers, "executor": executor}
    with progress_bars(as_json) as report:
        made = make_plan(model, recipe, out, overrides or (), report=report, **how)
    if as_json:
        needs = {"needs": made.needs.to_dict()}
        print(json.dumps([asdict(one) | needs for one in made.stages]))
        return
    print(made.needs.describe())
    for one in made.stages:
        account = one.accounting
        print(
            f"{one.stage}: {account['disk_bytes'] / 1e6:.2f} MB of {account['original_bytes'] / 1e6:.2f} MB, "
            f"{account['bits_per_expert_weight']:.3f} bits per original expert weight, "
            f"{account['expert_ratio']:.1%} of expert parameters and {account['model_ratio']:.1%} of all removed"
        )
        for path, decision in (one.decisions | one.notes).items():
            print(f"  {path}: {json.dumps(decision)}")


@app.command()
def validate(
    target: Annotated[str, typer.Argument(help="Recipe name, YAML file, or checkpoint folder.")],
    overrides: Overrides = None,
) -> None:
    """Check a recipe, or a checkpoint against its digests."""
    if Path(target).is_dir():
        from ..model.stream import StreamedModel

        if not (Path(target) / "moesvd.json").is_file():
            raise UsageError(f"{target}: no moesvd.json; not one of our checkpoints")
        StreamedModel(target)
        print(f"{target}: whole, and every file is the one its manifest names")
        return
    from ..recipe.recipe import load_recipe

    loaded = load_recipe(target, overrides or ())
    print(f"{target}: valid; stages: {' -> '.join(s.name for s in loaded.stages)}")


@app.command()
def ls(as_json: Json = False) -> None:
    """List the shipped recipes."""
    from ..recipe.recipe import shipped

    if as_json:
        print(json.dumps(dict(shipped())))
        return
    for name, line in shipped():
        print(f"{name:24} {line}")


@app.command()
def cp(
    name: Annotated[str, typer.Argument(help="Shipped recipe.")],
    file: Annotated[Path | None, typer.Argument(help="File to write; default NAME.yaml here.")] = None,
) -> None:
    """Copy a shipped recipe to a file of your own."""
    from ..recipe.recipe import read_shipped

    target = file or Path(f"{Path(name).name}.yaml")
    if target.exists():
        raise UsageError(f"{target}: exists; choose another name")
    target.write_text(read_shipped(name))
    print(target)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="One of our checkpoints.")],
    out: Out,
    to: Annotated[
        str,
        typer.Option(
            help="dense: plain 16-bit weights. Packed ones: compressed-tensors, for transformers and vLLM; gptq, for "
            "vLLM; gptqmodel, for GPTQModel."
        ),
    ] = "dense",
) -> None:
    """Write a checkpoint in a form that other software reads."""
    from ..export.export import export_checkpoint

    export_checkpoint(folder, out, to)
    print(out)
