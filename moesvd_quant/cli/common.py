"""What the verbs share: arguments, models by name, progress bars. Heavy imports stay inside functions."""

import sys
from contextlib import contextmanager
from pathlib import Path
from shutil import get_terminal_size
from textwrap import fill
from typing import Annotated, Literal

import typer

from ..errors import UsageError
from ..recipe.tasks import Tasks

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

Model = Annotated[str | None, typer.Option("--model", "-m", help="Hugging Face folder, or `reference`.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Output folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]
Memory = Annotated[str | None, typer.Option(help="Limit of memory, for example 16GB; default: what is free.")]
Workers = Annotated[int, typer.Option(min=1, help="Layers at a time, each in a process of its own.")]
Executor = Annotated[
    Literal["processes", "ray"], typer.Option(help="Where workers run: this machine, or the cluster of $RAY_ADDRESS.")
]
Recipe = Annotated[
    str, typer.Argument(help="Shipped name (see `moesvd ls`) or YAML file.", autocompletion=lambda: _recipe_names())
]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, for example svd.ratio=0.6.")]

Texts = Annotated[list[str] | None, typer.Option(help="wikitext2, ptb, c4, a file, or name=file; repeat it.")]
TaskNames = Annotated[
    str | None, typer.Option(help="Tasks by lm-eval's names and commas; zero-shot: the paper's seven.")
]
TaskData = Annotated[Path | None, typer.Option(help="Folder of local task files; else from the hub.")]
TaskLimit = Annotated[int | None, typer.Option(help="Only the first so many documents of each task.")]
RunCode = Annotated[
    bool, typer.Option("--run-code", help="Run programs that the model writes, where a task (humaneval) does.")
]


def _recipe_names() -> list[str]:
    """For shells that complete words."""
    from ..recipe.shipped import shipped

    return [name for name, _ in shipped()]


def tasks_of(names: str | None, data: Path | None, limit: int | None, run_code: bool) -> Tasks:
    """What the four options above ask for; names by commas."""
    asked = tuple(name.strip() for name in names.split(",")) if names else ()
    return Tasks(asked, None if data is None else str(data), limit, run_code)


@contextmanager
def progress_bars(quiet: bool = False):
    """Yields report(what, done, total), shown as bars with the time left on standard error. In a terminal something
    moves from the beginning on, and whenever no bar does: imports and models take seconds."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]}"))
    bars = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True), disable=quiet)
    tasks: dict = {}
    waiting = bars.add_task("working", total=None, count="")
    if bars.console.is_terminal:
        bars.start()

    def report(what: str, done: int, total: int) -> None:
        bars.start()
        if what not in tasks:
            tasks[what] = bars.add_task(what, total=total, count="")
        bars.update(tasks[what], completed=done, total=total, count=f"{done}/{total}")
        bars.update(waiting, visible=all(one.finished for one in bars.tasks if one.id != waiting))

    try:
        yield report
    finally:
        if bars.live.is_started:
            bars.remove_task(waiting)
            bars.stop()


def hanging(head: str, text: str) -> str:
    """A head and a text beside it, which in a terminal goes on below itself; one line for programs that read it."""
    if not sys.stdout.isatty():
        return head + text
    wide = max(get_terminal_size().columns, len(head) + 24)
    return fill(text, wide, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False)


def print_table(records: list[dict], form: str) -> None:
    from ..evaluation.paper_tables import table8
    from ..evaluation.record import doubts
    from ..evaluation.table import render
    from ..evaluation.task_table import task_table

    print(render(table8(records), form), end="")
    if (tasks := task_table(records)).rows:
        print(render(tasks, form), end="")
    for doubt in doubts(records):
        print(hanging("", doubt), file=sys.stderr)


def whole_numbers(given: str | None) -> list[int]:
    """Whole numbers by commas; ValueError names what is none."""
    try:
        return [int(part) for part in given.split(",")] if given else []
    except ValueError:
        raise UsageError(f"{given}: is no list of whole numbers like 1,2,3") from None
