"""Verbs that measure models and show what was measured: eval, table, speed, report."""

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
    RunCode,
    TaskData,
    TaskLimit,
    TaskNames,
    Texts,
    app,
    print_table,
    progress_bars,
    tasks_of,
    whole_numbers,
)
from .models import record_places


@app.command("eval")
def evaluate_verb(
    folders: Annotated[list[Path], typer.Argument(help="Model folders, ours or any.")],
    text: Texts = None,
    protocol: Annotated[list[str] | None, typer.Option(help="gptq (default), lm-eval; repeat it.")] = None,
    original: Annotated[
        str | None, typer.Option(help="Model that they were made of: also say how predictions differ from its.")
    ] = None,
    length: Annotated[int | None, typer.Option(help="Tokens per window.")] = None,
    stream: Annotated[
        bool | None, typer.Option("--stream/--no-stream", help="One layer in memory; default: where it does not fit.")
    ] = None,
    tasks: TaskNames = None,
    task_data: TaskData = None,
    limit: TaskLimit = None,
    run_code: RunCode = False,
    batch: Annotated[int | None, typer.Option(help="Windows, or requests of tasks, at a time.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the records; default: beside weights.")] = None,
    peak: Annotated[bool, typer.Option(help="Also measure peak memory in a fresh process.")] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Perplexity, zero-shot accuracy and memory of models; writes eval.json beside weights and prints a table."""
    asked, records = tasks_of(tasks, task_data, limit, run_code), []
    with progress_bars(as_json) as report:
        from ..evaluation.inputs import EvalSpec
        from ..evaluation.record import RECORD, evaluate, write
        from ..memory.files import require_writable
        from ..recipe.texts import named_texts

        texts = named_texts(text or ([] if tasks else ["wikitext2"]))
        source = None if original is None else resolve_model(original)
        wanted = EvalSpec(texts, tuple(protocol or ["gptq"]), length, batch, stream, *asked, peak=peak, original=source)
        models = {str(folder): resolve_model(str(folder)) for folder in folders}
        places = {given: place / RECORD for given, place in record_places(models, out).items()}
        for place in places.values():
            require_writable(place.parent)
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
    from ..evaluation.paper_tables import TABLES
    from ..evaluation.published import PRINTED
    from ..evaluation.record import collect
    from ..evaluation.table import render

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
    """Prefill and decode tokens per second, models alternating; writes speed.json beside weights, of folders."""
    if tp is not None:
        from ..evaluation import tensor_parallel
        from ..evaluation.table import render

        models = [resolve_model(str(folder)) for folder in folders]
        link = tensor_parallel.Device(flops * 1e12, bandwidth * 1e9)
        counted = tensor_parallel.tensor_parallel_table(models, ratio or [], whole_numbers(batch), tp, link)
        print(render(counted, "json" if as_json else "terminal"), end="")
        return
    with progress_bars(as_json) as report:
        from ..evaluation.speed import run_speed, write_speed
        from ..evaluation.speed_table import speed_table
        from ..evaluation.table import render
        from ..run.threads import sync_threads

        sync_threads()
        found = [resolve_model(str(folder)) for folder in folders]
        result = run_speed(
            found,
            ratio or [],
            whole_numbers(batch),
            whole_numbers(length),
            tokens,
            repeats,
            resolve_device(device),
            report,
        )
    for place in record_places(dict(zip(map(str, folders), found)), None).values():
        write_speed(result, place)
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
