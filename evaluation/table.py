"""A table, and the forms it is printed in."""

import csv
import io
import json
import re
import shutil
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import UsageError

FORMATS = ("terminal", "markdown", "csv", "json", "latex")


@dataclass(frozen=True)
class Table:
    title: str
    columns: list[str]
    rows: list[list[str | float]]

    @property
    def phrases(self) -> set[int]:
        """Columns that hold phrases, not figures: some cell has more than 40 characters."""
        return {index for row in self.rows for index, cell in enumerate(row) if len(str(cell)) > 40}


def save(table: Table, file: Path) -> None:
    """Writes FILE.md, FILE.csv and FILE.json."""
    for form, ending in (("markdown", "md"), ("csv", "csv"), ("json", "json")):
        file.with_name(f"{file.name}.{ending}").write_text(render(table, form))


def render(table: Table, form: str = "terminal") -> str:
    """The table as one of FORMATS; ValueError for another."""
    if form == "terminal":
        return _terminal(table)
    if form == "markdown":
        lines = ["| " + " | ".join(table.columns) + " |", "|---" * len(table.columns) + "|"]
        lines += ["| " + " | ".join(map(str, row)) + " |" for row in table.rows]
        return "\n".join(lines) + "\n"
    if form == "csv":
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([table.columns, *table.rows])
        return text.getvalue()
    if form == "json":
        return json.dumps([dict(zip(table.columns, row)) for row in table.rows], indent=1) + "\n"
    if form == "latex":
        return _latex(table)
    raise UsageError(f"{form!r} is none of {', '.join(FORMATS)}")


def _latex(table: Table) -> str:
    """With the commands of the package booktabs."""
    special = {"\u2193": r"$\downarrow$", "\u2191": r"$\uparrow$", "\u00b1": r"$\pm$"}
    special |= {c: "\\" + c for c in "%_&#$"} | {"@": "{@}"}
    cell = lambda value: re.sub("|".join(map(re.escape, special)), lambda m: special[m[0]], str(value))  # noqa: E731
    line = lambda row: " & ".join(map(cell, row)) + r" \\"  # noqa: E731
    head = ["\\begin{tabular}{l" + "r" * (len(table.columns) - 1) + "}", r"\toprule", line(table.columns), r"\midrule"]
    return "\n".join([*head, *map(line, table.rows), r"\bottomrule", r"\end{tabular}"]) + "\n"


def _terminal(table: Table) -> str:
    """Where a line is too long, heads wrap between words and columns stand closer; where that is not enough, the table
    goes on below itself with the columns again that tell its rows apart. Cells are never cut."""
    cells = [[column, *(str(row[index]) for row in table.rows)] for index, column in enumerate(table.columns)]
    widths, room, apart = [max(map(len, column)) for column in cells], shutil.get_terminal_size().columns, 2
    if sum(widths) + apart * (len(widths) - 1) > room:
        widths, apart = [max(map(len, [*head.split(), *values, ""])) for head, *values in cells], 1
    named = list(range(_naming(table)))
    start = sum(widths[index] + apart for index in named) - apart
    blocks, used = [[*named]], start
    for index, width in list(enumerate(widths))[len(named) :]:
        if used + apart + width > room and len(blocks[-1]) > len(named):
            blocks, used = [*blocks, [*named]], start
        blocks[-1].append(index)
        used += apart + width
    title = f"{textwrap.fill(table.title, room)}\n" if table.title else ""
    return title + "\n".join(_block(table, block, widths, apart, room) for block in blocks)


def _naming(table: Table) -> int:
    """How many of the first columns tell the rows apart: one or two; one where not even two do."""
    pairs = {tuple(row[:2]) for row in table.rows}
    firsts = {row[0] for row in table.rows}
    return 2 if len(firsts) < len(pairs) == len(table.rows) and len(table.columns) > 2 else 1


def _block(table: Table, columns: list[int], widths: list[int], apart: int, room: int) -> str:
    import rich.box
    import rich.table
    from rich.console import Console

    shown = rich.table.Table(
        box=rich.box.SIMPLE_HEAD, padding=(0, apart - 1, 0, 0), show_edge=False, pad_edge=False
    )  # fmt: skip
    for index in columns:
        justify: Literal["left", "right"] = "right" if index else "left"
        shown.add_column(table.columns[index], justify=justify, width=widths[index], vertical="bottom")
    for row in table.rows:
        shown.add_row(*(str(row[index]) for index in columns))
    wide = sum(widths[index] for index in columns) + apart * len(columns)
    console = Console(width=max(room, wide), file=io.StringIO())
    console.print(shown)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return "".join(f"{line.rstrip()}\n" for line in lines)
