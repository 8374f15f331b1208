"""Verbs that run several recipes and compare what comes out: bench, pareto, demo."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ..model.named import resolve_device, resolve_model
from .common import (
    Device,
    Json,
    Model,
    Out,
    Overrides,
    RunCode,
    TaskData,
    TaskLimit,
    TaskNames,
    Texts,
    app,
    progress_bars,
    tasks_of,
    whole_numbers,
)


@app.command()
def bench(
    recipes: Annotated[list[str], typer.Argument(help="Recipes to compare, then key=value overrides for all.")],
    model: Model = None,
    text: Texts = None,
    length: Annotated[int | None, typer.Option(help="Tokens per window.")] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Repeat with these seeds, by commas; shows mean and spread.")
    ] = None,
    samples: Annotated[
        str | None, typer.Option(help="Repeat with these numbers of calibration windows, by commas.")
    ] = None,
    tasks: TaskNames = None,
    task_data: TaskData = None,
    limit: TaskLimit = None,
    run_code: RunCode = False,
    out: Out = Path("bench"),
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Compare recipes on one model: runs each, evaluates all, prints the table, draws the plot."""
    names, overrides = [r for r in recipes if "=" not in r], [r for r in recipes if "=" in r]
    asked = tasks_of(tasks, task_data, limit, run_code)
    with progress_bars(as_json) as report:
        from ..comparison.bench import compare
        from ..recipe.texts import named_texts
        from ..run.threads import sync_threads

        sync_threads()
        texts, folder, where = named_texts(text or ["wikitext2"]), resolve_model(model), resolve_device(device)
        if seeds or samples:
            from ..comparison.sweep import sweep
            from ..evaluation.inputs import EvalSpec

            wanted = EvalSpec(texts, ("gptq",), length, None, None, *asked)
            records, found = sweep(
                folder,
                names,
                out,
                wanted,
                whole_numbers(seeds or "0"),
                whole_numbers(samples),
                overrides,
                where,
                report,
            )
        else:
            records, found = compare(folder, names, out, texts, length, overrides, where, report, (), asked)
    _print_comparison(records, found, out, as_json)


@app.command()
def pareto(
    overrides: Overrides = None,
    model: Model = None,
    budget: Annotated[list[str] | None, typer.Option(help="1.5bpw, 20GB; repeat it.")] = None,
    preset: Annotated[str, typer.Option(help="fast, balanced or best.")] = "balanced",
    text: Texts = None,
    length: Annotated[int | None, typer.Option(help="Tokens per window.")] = None,
    out: Out = Path("pareto"),
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """The memory-perplexity front: many budgets from one calibration, and which route is best at each size.

    Other routes to the same bytes (fewer experts, ranks or bits), GPTQ, NF4 and the paper's settings stand beside them.
    """
    budgets = budget or ["1bpw", "1.5bpw", "2bpw", "2.5bpw", "3bpw", "4bpw"]
    with progress_bars(as_json) as report:
        from ..comparison.pareto import front
        from ..evaluation.table import render
        from ..recipe.texts import named_texts
        from ..run.threads import sync_threads

        sync_threads()
        texts, folder, where = named_texts(text or ["wikitext2"]), resolve_model(model), resolve_device(device)
        records, found, judged = front(folder, out, budgets, texts, length, preset, overrides or (), where, report)
    _print_comparison(records, found, out, as_json)
    if not as_json:
        print(render(judged), end="")


@app.command()
def demo(out: Out = Path("demo-out"), as_json: Json = False) -> None:
    """Compress the embedded model in several ways on embedded text, and print the table."""
    with progress_bars(as_json) as report:
        from ..comparison.demo import run_demo

        result = run_demo(out, report)
    _print_comparison(*result, out, as_json)


def _print_comparison(records: list[dict], compared, out: Path, as_json: bool) -> None:
    from ..evaluation.table import render
    from ..evaluation.task_table import task_table

    if as_json:
        print(json.dumps(records))
        return
    print(render(compared), end="")
    if (tasks := task_table(records)).rows and "sweep" not in records[-1]:
        print(render(tasks), end="")
    written = " ".join(str(path) for path in sorted([*out.glob("ta[bs]*.*"), *out.glob("*.png")]))
    print(f"checkpoints: {out}/*/0*-*\ntable and plot: {written}")
