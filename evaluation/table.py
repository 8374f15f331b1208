"""Tables of records, in the spirit of the paper's Table 8: memory and perplexity of each method."""

import csv
import io
import json
from dataclasses import dataclass

FORMATS = ("terminal", "markdown", "csv", "json")


@dataclass(frozen=True)
class Table:
    title: str
    columns: list[str]
    rows: list[list[str | float]]


def table8(records: list[dict]) -> Table:
    """Methods as rows, largest first: bytes on disk, after load and at the peak (where measured), bits per
    original expert weight, what was removed, perplexity on each text."""
    texts = list(dict.fromkeys(text for r in records for text in r["perplexity"]))
    lengths = sorted({r["protocol"]["length"] for r in records})
    peaks = any("peak_rss_bytes" in r["memory"] for r in records)
    rows: list[list[str | float]] = []
    for record in sorted(records, key=lambda r: (-r["memory"]["disk_bytes"], r["name"])):
        memory, account = record["memory"], record["accounting"]
        figures = [record["perplexity"].get(text, {}).get("ppl") for text in texts]
        rows.append([
            record["name"],
            _megabytes(memory["disk_bytes"]),
            _megabytes(memory["resident_bytes"]),
            *([_megabytes(_peak(memory))] if peaks else []),
            round(account["bits_per_expert_weight"], 3),
            round(100 * account["expert_ratio"], 1),
            round(100 * account["model_ratio"], 1),
            *["-" if value is None else float(f"{value:.5g}") for value in figures],
        ])  # fmt: skip
    columns = [
        "method", "disk MB", "loaded MB", *(["peak MB"] if peaks else []),
        "bits/expert weight", "experts removed %", "model removed %", *texts,
    ]  # fmt: skip
    windows = ", ".join(map(str, lengths))
    return Table(f"Memory and perplexity (windows of {windows} tokens)", columns, rows)


def _peak(memory: dict) -> int | None:
    """Peak of loading and generating, above what importing the libraries takes."""
    return memory["peak_rss_bytes"] - memory["import_rss_bytes"] if "peak_rss_bytes" in memory else None


def _megabytes(size: int | None) -> str | float:
    return "-" if size is None else round(size / 1e6, 3)


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
    raise ValueError(f"{form!r} is none of {', '.join(FORMATS)}")


def _terminal(table: Table) -> str:
    import rich.box
    import rich.table
    from rich.console import Console

    shown = rich.table.Table(title=table.title, box=rich.box.SIMPLE_HEAD)
    for index, column in enumerate(table.columns):
        shown.add_column(column, justify="right" if index else "left", no_wrap=index == 0)
    for row in table.rows:
        shown.add_row(*map(str, row))
    console = Console(width=sum(len(column) + 3 for column in table.columns) + 20, file=io.StringIO())
    console.print(shown)
    return console.file.getvalue()  # type: ignore[attr-defined]
