"""Verbs that measure and compare: eval, table, speed, report, bench, demo."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from ..model.named import resolve_device, resolve_model
from .common import (
    Device,
    Json,
    Model,
    Out,
    Overrides,
    TaskData,
    TaskLimit,
    TaskNames,
    app,
    print_table,
    progress_bars,
    tasks_of,
)
from .models import record_places


@app.command("eval")
def evaluate_verb(
    folders: Annotated[list[Path], typer.Argument(help="Model folders, ours or any.")],
    text: Annotated[list[str] | None, typer.Option(help="Known name, file, or name=file; repeat it.")] = None,
    protocol: Annotated[list[str] | None, typer.Option(help="gptq (default), lm-eval; repeat it.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens per window.")] = None,
    stream: Annotated[
        bool | None, typer.Option("--stream/--no-stream", help="One layer in memory; default: where it does not fit.")
    ] = None,
    tasks: TaskNames = None,
    task_data: TaskData = None,
    limit: TaskLimit = None,
    batch: Annotated[int | None, typer.Option(help="Windows, or requests of tasks, at a time.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the records; default: beside weights.")] = None,
    peak: Annotated[bool, typer.Option(help="Also measure peak memory in a fresh process.")] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Perplexity, zero-shot accuracy and memory of models; writes eval.json beside weights and prints a table."""
    from ..evaluation.inputs import EvalSpec
    from ..evaluation.record import RECORD, evaluate, write
    from ..memory.files import require_writable
    from ..recipe.recipe import named_texts

    texts = named_texts(text or ([] if tasks else ["wikitext2"]))
    wanted = EvalSpec(
        texts, tuple(protocol or ["gptq"]), length, batch, stream, *tasks_of(tasks, task_data, limit), peak=peak
    )
    records = []
    models = {str(folder): resolve_model(str(folder)) for folder in folders}
    places = {given: place / RECORD for given, place in record_places(models, out).items()}
    for place in places.values():
        require_writable(place.parent)
    with progress_bars(as_json) as report:
        for given, folder in models.items():
            say = lambda what, done, total, folder=folder: report(f"{folder.name}: {what}", done, total)  # noqa: E731
            record = evaluate(folder, wanted, resolve_device(device), None, say)
            records.append(record)
            if given in places:
                write(record, places[given])
            else:
                print(f"{given}: is a name and no folder: no record is kept; --out DIR keeps one", file=sys.stderr)
    if as_json:
        print(json.dumps(records))
        return
    print_table(records, "terminal")
    for record in records:
        for name, figures in record["perplexity"].items():
            if figures.get("interval"):
                low, high = figures["interval"]
                print(f"{record['name']} on {name}: {figures['ppl']:.5g}, 95 % interval {low:.5g} to {high:.5g}")


@app.command()
def table(
    number: Annotated[str, typer.Argument(help="Table of the paper: 2, 8, 8-printed, 11, 12 or 12-paired; or tasks.")],
    folders: Annotated[list[Path], typer.Argument(help="Folders with eval.json, or of runs.")],
    form: Annotated[str, typer.Option("--format", help="terminal, markdown, csv, json or latex.")] = "terminal",
    plot: Annotated[Path | None, typer.Option(help="Also draw perplexity against bytes into this PNG.")] = None,
) -> None:
    """Print a table in the paper's layout, from the records of evaluated checkpoints."""
    from ..evaluation.published import PRINTED
    from ..evaluation.record import collect
    from ..evaluation.table import TABLES, render

    tables = TABLES | PRINTED
    if number not in tables:
        raise UsageError(f"table {number}: is none of {', '.join(tables)}")
    records = collect(folders)
    print(render(tables[number](records), form), end="")
    if plot:
        from ..evaluation.plot import plot_bytes

        plot_bytes(records, plot)
        print(f"plot: {plot}", file=sys.stderr)


@app.command()
def speed(
    folders: Annotated[
        list[Path], typer.Argument(help="Models side by side; the first is compared with. A config is enough.")
    ],
    ratio: Annotated[
        list[float] | None,
        typer.Option(help="Add the first model, factorized by this ratio, with random weights; repeat it."),
    ] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes, by commas.")] = "1,4,16",
    length: Annotated[str, typer.Option(help="Prompt lengths, by commas.")] = "32,128",
    tokens: Annotated[int, typer.Option(help="Tokens to write.")] = 16,
    repeats: Annotated[int, typer.Option(help="Rounds in which each model has its turn.")] = 7,
    plot: Annotated[Path | None, typer.Option(help="Also draw the paper's Figure 4 into this PNG.")] = None,
    tp: Annotated[
        int | None, typer.Option(min=1, help="Measure nothing: count what experts split over so many devices cost.")
    ] = None,
    flops: Annotated[float, typer.Option(help="With --tp: TFLOP/s of a device.")] = 19.5,
    bandwidth: Annotated[float, typer.Option(help="With --tp: GB/s of its link.")] = 600.0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Prefill and decode tokens per second, models alternating; writes speed.json beside weights."""
    if tp is not None:
        from ..evaluation import tensor_parallel
        from ..evaluation.table import render

        models = [resolve_model(str(folder)) for folder in folders]
        link = tensor_parallel.Device(flops * 1e12, bandwidth * 1e9)
        counted = tensor_parallel.tensor_parallel_table(models, ratio or [], _numbers(batch), tp, link)
        print(render(counted, "json" if as_json else "terminal"), end="")
        return
    from ..evaluation.speed import run_speed
    from ..evaluation.table import render, speed_table
    from ..run.run import sync_threads

    sync_threads()
    found = [resolve_model(str(folder)) for folder in folders]
    with progress_bars(as_json) as report:
        result = run_speed(
            found, ratio or [], _numbers(batch), _numbers(length), tokens, repeats, resolve_device(device), report
        )
    print(json.dumps(result) if as_json else render(speed_table(result)), end="")
    if plot:
        from ..evaluation.plot import plot_speed

        plot_speed(result, plot)
        print(f"plot: {plot}", file=sys.stderr)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Output folder of a run, a checkpoint of ours, or a folder of runs.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="HTML file; default: FOLDER/report.html.")] = None,
) -> None:
    """One HTML page that needs no other file: of a run, layer by layer, or of a folder of runs, beside each other."""
    from ..evaluation.report import write_report

    file = out or folder / "report.html"
    write_report(folder, file)
    print(file)


@app.command()
def bench(
    recipes: Annotated[list[str], typer.Argument(help="Recipes to compare, then key=value overrides for all.")],
    model: Model = None,
    text: Annotated[list[str] | None, typer.Option(help="Known name, file, or name=file; repeat it.")] = None,
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
    out: Out = Path("bench"),
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Compare recipes on one model: runs each, evaluates all, prints the table, draws the plot."""
    from ..comparison.bench import compare
    from ..recipe.recipe import named_texts
    from ..run.run import sync_threads

    sync_threads()
    names, overrides = [r for r in recipes if "=" not in r], [r for r in recipes if "=" in r]
    texts, folder, where = named_texts(text or ["wikitext2"]), resolve_model(model), resolve_device(device)
    asked = tasks_of(tasks, task_data, limit)
    with progress_bars(as_json) as report:
        if seeds or samples:
            from ..comparison.sweep import sweep
            from ..evaluation.inputs import EvalSpec

            wanted = EvalSpec(texts, ("gptq",), length, None, None, *asked)
            records, found = sweep(
                folder, names, out, wanted, _numbers(seeds or "0"), _numbers(samples), overrides, where, report
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
    text: Annotated[list[str] | None, typer.Option(help="Known name, file, or name=file; repeat it.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens per window.")] = None,
    out: Out = Path("pareto"),
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """The memory-perplexity front: one calibration, many budgets, beside GPTQ, NF4 and the paper's settings."""
    from ..comparison.pareto import front
    from ..recipe.recipe import named_texts
    from ..run.run import sync_threads

    sync_threads()
    budgets = budget or ["1bpw", "1.5bpw", "2bpw", "2.5bpw", "3bpw", "4bpw"]
    texts, folder, where = named_texts(text or ["wikitext2"]), resolve_model(model), resolve_device(device)
    with progress_bars(as_json) as report:
        records, found = front(folder, out, budgets, texts, length, preset, overrides or (), where, report)
    _print_comparison(records, found, out, as_json)


@app.command()
def demo(out: Out = Path("demo-out"), as_json: Json = False) -> None:
    """Compress the embedded model in several ways on embedded text, and print the table."""
    from ..comparison.demo import run_demo

    with progress_bars(as_json) as report:
        result = run_demo(out, report)
    _print_comparison(*result, out, as_json)


def _numbers(given: str | None) -> list[int]:
    """Whole numbers by commas; ValueError names what is none."""
    try:
        return [int(part) for part in given.split(",")] if given else []
    except ValueError:
        raise UsageError(f"{given}: is no list of whole numbers like 1,2,3") from None


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
