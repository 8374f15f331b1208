"""The command line. Verbs are thin: they read arguments, call one function, print. Heavy imports stay inside."""

import json
import logging
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="Makes MoE models small."
)

Model = Annotated[str | None, typer.Option("--model", "-m", help="Hugging Face folder, or `reference`.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Output folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, for example svd.ratio=0.6.")]


def main() -> None:
    """Runs a verb; errors that a user can mend are one message and exit code 1."""
    for name in ("torchao", "torch.utils._pytree"):  # they complain of kernels that nothing here uses
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        app()
    except (ValueError, OSError, RuntimeError) as error:
        if "--debug" in sys.argv:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it was", file=sys.stderr)
        sys.exit(130)


def resolve_model(name: str | None, recipe=None) -> Path:
    """Folder of a model: a local path, `reference` for the embedded one, or a hub name that is in the cache
    or can be downloaded (`name@revision`). ValueError where there is none."""
    name = name or (recipe.model if recipe else None)
    if not name:
        raise ValueError("no model: give --model FOLDER, or `model:` in the recipe")
    if name == "reference":
        from .reference import path

        return path()
    if Path(name).is_dir():
        return Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ValueError(f"{name}: no such folder")
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    patterns = ["*.safetensors", "*.json", "tokenizer*", "*.txt", "*.model", "*.jinja", "README.md"]
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns))
    except Exception as error:  # the hub's many network errors
        raise ValueError(f"{name}: no such folder, and it cannot be had from the hub: {error}") from error


def resolve_device(name: str) -> str:
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


@contextmanager
def progress_bars(quiet: bool = False):
    """Yields report(what, done, total), shown as bars with the time left on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    bars = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True), disable=quiet)
    tasks: dict = {}

    def report(what: str, done: int, total: int) -> None:
        bars.start()  # not before there is something to show
        if what not in tasks:
            tasks[what] = bars.add_task(what, total=total)
        bars.update(tasks[what], completed=done, total=total)

    try:
        yield report
    finally:
        if tasks:
            bars.stop()


def _start(recipe_name: str, model: str | None, overrides: list[str] | None, out: Path, device: str, report):
    from .recipe import load_recipe
    from .runner import Run, sync_threads

    recipe = load_recipe(recipe_name, overrides or ())
    sync_threads()
    folder = resolve_model(model, recipe)
    return Run(recipe, folder, out, resolve_device(device), report)


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="Shipped name (see `moesvd ls`) or YAML file.")],
    overrides: Overrides = None,
    model: Model = None,
    out: Out = Path("out"),
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Run a recipe: each stage writes a checkpoint under OUT; interrupted, the same command goes on."""
    with progress_bars(as_json) as report:
        job = _start(recipe, model, overrides, out, device, report)
        folders = job.run()
        records = _evaluate_run(job, folders, resolve_device(device), report)
    result = {"checkpoints": [str(f) for f in folders], "evaluation": records}
    if as_json:
        print(json.dumps(result))
        return
    for folder in folders:
        print(f"{folder}: {json.loads((folder / 'moesvd.json').read_text())['accounting']['disk_bytes'] / 1e6:.2f} MB")
    if records:
        _print_table(records, "terminal")


def _evaluate_run(job, folders: list[Path], device: str, report: Callable) -> list[dict]:
    """Evaluates the original and every checkpoint of a run on the recipe's texts."""
    from .bench import measured

    wanted, records = job.recipe.evaluate, []
    length = None if wanted.length == "auto" else wanted.length
    if not wanted.texts():
        return []
    for source, folder in [(job.model, job.out / "00-original"), *((f, f) for f in folders)]:
        say = lambda what, done, total, folder=folder: report(f"{folder.name}: {what}", done, total)  # noqa: E731
        records.append(measured(source, folder, wanted.texts(), length, device, say))
    return records


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(help="Shipped name or YAML file.")],
    overrides: Overrides = None,
    model: Model = None,
    out: Out = Path("out"),
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Forecast the bytes of every stage, exactly, and show what goes where; changes no weight."""
    from .planning import plan_stages

    with progress_bars(as_json) as report:
        forecasts = plan_stages(_start(recipe, model, overrides, out, device, report))
    if as_json:
        print(json.dumps(forecasts))
        return
    for forecast in forecasts:
        account = forecast["accounting"]
        print(
            f"{forecast['stage']}: {account['disk_bytes'] / 1e6:.2f} MB of {account['original_bytes'] / 1e6:.2f} MB, "
            f"{account['bits_per_expert_weight']:.3f} bits per original expert weight, "
            f"{account['expert_ratio']:.1%} of expert parameters and {account['model_ratio']:.1%} of all removed"
        )
        for path, decision in forecast["decisions"].items():
            print(f"  {path}: {json.dumps(decision)}")


@app.command()
def validate(
    target: Annotated[str, typer.Argument(help="Recipe name, YAML file, or checkpoint folder.")],
    overrides: Overrides = None,
) -> None:
    """Check a recipe, or a checkpoint against its digests."""
    if Path(target).is_dir():
        from .model.modeling_moesvd import check_digests
        from .model.stream import StreamedModel

        if not (Path(target) / "moesvd.json").is_file():
            raise ValueError(f"{target}: no moesvd.json; not one of our checkpoints")
        check_digests(Path(target))
        StreamedModel(target)
        print(f"{target}: whole, and every file is the one its manifest names")
        return
    from .recipe import load_recipe

    loaded = load_recipe(target, overrides or ())
    print(f"{target}: valid; stages: {' -> '.join(s.name for s in loaded.stages)}")


@app.command()
def ls(as_json: Json = False) -> None:
    """List the shipped recipes."""
    from .recipe import shipped

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
    from .recipe import read_shipped

    target = file or Path(f"{Path(name).name}.yaml")
    if target.exists():
        raise ValueError(f"{target}: exists; choose another name")
    target.write_text(read_shipped(name))
    print(target)


@app.command("eval")
def evaluate_verb(
    folders: Annotated[list[Path], typer.Argument(help="Model folders, ours or any.")],
    text: Annotated[list[str] | None, typer.Option(help="Known name, file, or name=file; repeat it.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens per window.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the records; default: beside the weights.")] = None,
    peak: Annotated[bool, typer.Option(help="Also measure peak memory in a fresh process.")] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Perplexity and memory of model folders; writes eval.json and prints a table."""
    from .evaluation.record import RECORD, evaluate, write
    from .recipe import named_texts

    named = named_texts(text or ["wikitext2"])
    records = []
    with progress_bars(as_json) as report:
        for folder in folders:
            say = lambda what, done, total, folder=folder: report(f"{folder.name}: {what}", done, total)  # noqa: E731
            record = evaluate(resolve_model(str(folder)), named, length, resolve_device(device), None, peak, say)
            write(record, (out / folder.name if out else folder) / RECORD)
            records.append(record)
    print(json.dumps(records)) if as_json else _print_table(records, "terminal")


@app.command()
def table(
    number: Annotated[str, typer.Argument(help="Table of the paper: 8.")],
    folders: Annotated[list[Path], typer.Argument(help="Folders with eval.json, or of runs.")],
    form: Annotated[str, typer.Option("--format", help="terminal, markdown, csv or json.")] = "terminal",
    plot: Annotated[Path | None, typer.Option(help="Also draw perplexity against bytes into this PNG.")] = None,
) -> None:
    """The paper's Table 8 of any checkpoints that were evaluated."""
    from .evaluation.record import collect

    if number != "8":
        raise ValueError(f"table {number}: only table 8 is there")
    records = collect(folders)
    _print_table(records, form)
    if plot:
        from .evaluation.plot import plot_bytes

        plot_bytes(records, plot)
        print(f"plot: {plot}", file=sys.stderr)


def _print_table(records: list[dict], form: str) -> None:
    from .evaluation.table import render, table8

    print(render(table8(records), form), end="")


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="One of our checkpoints.")],
    out: Out,
    to: Annotated[str, typer.Option(help="dense: plain 16-bit weights; gptq: a standard GPTQ checkpoint.")] = "dense",
) -> None:
    """Write a checkpoint in a form that other software reads."""
    from .export import export_checkpoint

    export_checkpoint(folder, out, to)
    print(out)


@app.command()
def bench(
    recipes: Annotated[list[str], typer.Argument(help="Recipes to compare, then key=value overrides for all.")],
    model: Model = None,
    text: Annotated[list[str] | None, typer.Option(help="Known name, file, or name=file; repeat it.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens per window.")] = None,
    out: Out = Path("bench"),
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Compare recipes on one model: runs each, evaluates all, prints the table, draws the plot."""
    from .bench import compare
    from .recipe import named_texts
    from .runner import sync_threads

    sync_threads()
    names, overrides = [r for r in recipes if "=" not in r], [r for r in recipes if "=" in r]
    texts, folder = named_texts(text or ["wikitext2"]), resolve_model(model)
    with progress_bars(as_json) as report:
        result = compare(folder, names, out, texts, length, overrides, resolve_device(device), report)
    _print_comparison(*result, out, as_json)


@app.command()
def demo(out: Out = Path("demo-out"), as_json: Json = False) -> None:
    """Compress the embedded model in several ways on embedded text, and print the table."""
    from .demo import run_demo

    with progress_bars(as_json) as report:
        result = run_demo(out, report)
    _print_comparison(*result, out, as_json)


def _print_comparison(records: list[dict], compared, out: Path, as_json: bool) -> None:
    from .evaluation.table import render

    if as_json:
        print(json.dumps(records))
        return
    print(render(compared), end="")
    print(f"checkpoints: {out}/*/0*-*\ntable: {out}/table8.md, .csv, .json\nplot: {out}/perplexity-against-bytes.png")


if __name__ == "__main__":
    main()
