"""Verbs that make checkpoints, and those about recipes: run, plan, validate, ls, cp, export."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

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
    resolve_device,
    start_run,
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
    with progress_bars(as_json) as report:
        job = start_run(recipe, model, overrides, out, device, report, memory, workers, executor)
        folders = job.run()
        records = _evaluate_run(job, folders, resolve_device(device), report)
    result = {"checkpoints": [str(f) for f in folders], "evaluation": records}
    if as_json:
        print(json.dumps(result))
        return
    for folder in folders:
        print(f"{folder}: {json.loads((folder / 'moesvd.json').read_text())['accounting']['disk_bytes'] / 1e6:.2f} MB")
    if records:
        print_table(records, "terminal")


def _evaluate_run(job, folders: list[Path], device: str, report: Callable) -> list[dict]:
    """Evaluates the original and every checkpoint of a run on the recipe's texts."""
    from ..compare.bench import cached_evaluate
    from ..evaluation.inputs import EvalSpec

    asked, records = job.recipe.evaluate, []
    if not asked.texts():
        return []
    wanted = EvalSpec(asked.texts(), length=None if asked.length == "auto" else asked.length)
    for source, folder in [(job.model, job.out / "00-original"), *((f, f) for f in folders)]:
        say = lambda what, done, total, folder=folder: report(f"{folder.name}: {what}", done, total)  # noqa: E731
        records.append(cached_evaluate(source, folder, wanted, device, say))
    return records


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
    from ..run.plan import plan_stages

    with progress_bars(as_json) as report:
        job = start_run(recipe, model, overrides, out, device, report, memory, workers, executor)
        needs = job.needs()
        needs.require(job.statistics.store)
        forecasts = plan_stages(job)
        job.pool.close()
    if as_json:
        print(json.dumps([forecast | {"needs": needs.to_dict()} for forecast in forecasts]))
        return
    print(needs.describe())
    for forecast in forecasts:
        account = forecast["accounting"]
        print(
            f"{forecast['stage']}: {account['disk_bytes'] / 1e6:.2f} MB of {account['original_bytes'] / 1e6:.2f} MB, "
            f"{account['bits_per_expert_weight']:.3f} bits per original expert weight, "
            f"{account['expert_ratio']:.1%} of expert parameters and {account['model_ratio']:.1%} of all removed"
        )
        for path, decision in (forecast["decisions"] | forecast["notes"]).items():
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
    to: Annotated[str, typer.Option(help="dense: plain 16-bit weights; gptq: a standard GPTQ checkpoint.")] = "dense",
) -> None:
    """Write a checkpoint in a form that other software reads."""
    from ..export.export import export_checkpoint

    export_checkpoint(folder, out, to)
    print(out)
