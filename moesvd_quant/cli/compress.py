"""Verbs that make checkpoints, and those about recipes: run, validate, ls, schema, cp, export."""

import json
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
    Recipe,
    Workers,
    app,
    hanging,
    print_table,
    progress_bars,
)


@app.command()
def run(
    recipe: Recipe,
    overrides: Overrides = None,
    model: Model = None,
    out: Out = Path("out"),
    device: Device = "auto",
    memory: Memory = None,
    workers: Workers = 1,
    executor: Executor = "processes",
    push: Annotated[str | None, typer.Option(help="Upload the result to the hub as user/name, private.")] = None,
    as_json: Json = False,
) -> None:
    """Run a recipe: each stage writes a checkpoint under OUT; interrupted, the same command goes on."""
    how: Any = {"device": device, "memory": memory, "workers": workers, "executor": executor}
    with progress_bars(as_json) as report:
        from ..api import compress

        made = compress(model, recipe, out, overrides or (), push=push, report=report, **how)
    records = [one.record for one in made.evaluation]
    if as_json:
        checkpoints = list(map(str, made.checkpoints))
        print(json.dumps({"checkpoints": checkpoints, "evaluation": records, "address": made.address}))
        return
    for folder in made.checkpoints:
        print(f"{folder}: {json.loads((folder / 'moesvd.json').read_text())['accounting']['disk_bytes'] / 1e6:.2f} MB")
    if records:
        print_table(records, "terminal")
    if made.address:
        print(made.address)


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
    from ..recipe.load import load_recipe

    loaded = load_recipe(target, overrides or ())
    print(f"{target}: valid; stages: {' -> '.join(s.name for s in loaded.stages)}")


@app.command()
def ls(as_json: Json = False) -> None:
    """List the shipped recipes."""
    from ..recipe.shipped import shipped

    if as_json:
        print(json.dumps(dict(shipped())))
        return
    for name, line in shipped():
        print(hanging(f"{name:24} ", line))


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, which editors complete and check by."""
    from ..recipe.schema import recipe_schema

    print(json.dumps(recipe_schema(), indent=1))


@app.command()
def cp(
    name: Recipe,
    file: Annotated[Path | None, typer.Argument(help="File to write; default NAME.yaml here.")] = None,
) -> None:
    """Copy a shipped recipe to a file of your own."""
    from ..recipe.shipped import read_shipped

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
