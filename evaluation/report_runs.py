"""One HTML page of a folder of runs: what each made, and what it cost, beside each other."""

from pathlib import Path

from ..memory.files import read_json
from ..runtime.modeling_moesvd import MANIFEST
from .changes import change_table, changes
from .difference_columns import compared_texts, texts_of
from .page import Picture, svg, write_page
from .paper_tables import table8
from .plot import figure_bytes, figure_divergence
from .record import RECORD, collect
from .report_figures import DIVERGENCE
from .table import Table
from .task_table import task_table


def runs_in(folder: Path) -> dict[str, list[Path]]:
    """{name of a run: its checkpoints} of a folder whose sub-folders are runs."""
    runs: dict[str, list[Path]] = {}
    for manifest in sorted(folder.glob(f"*/*/{MANIFEST}")):
        if "stages" in read_json(manifest):
            runs.setdefault(manifest.parent.parent.name, []).append(manifest.parent)
    return runs


def write_runs(folder: Path, runs: dict[str, list[Path]], file: Path) -> None:
    """runs: of `runs_in`."""
    records = _records(folder)
    drawn = [record for record in records if record["perplexity"]]
    texts, compared = texts_of(drawn), compared_texts(records)
    pictures = [("Perplexity against bytes", "Lower left is better.", figure_bytes, len(texts))] if drawn else []
    if compared:
        pictures.append(("Divergence against bytes", DIVERGENCE, figure_divergence, len(compared)))
    write_page(
        "runs.html.jinja",
        file,
        name=folder.resolve().name,
        runs=_table(runs),
        measured=table8(records) if records else None,
        changes=change_table(changes(records)),
        tasks=task_table(records),
        figures=[
            Picture(title, note, svg(lambda draw=draw: draw(drawn)), panels) for title, note, draw, panels in pictures
        ],
        recipes=[(name, read_json(paths[-1] / MANIFEST)["recipe"]) for name, paths in runs.items()],
    )


def _records(folder: Path) -> list[dict]:
    """The figures of all models of the folder, each once."""
    measured = sorted({file.parent for file in [*folder.glob(f"*/{RECORD}"), *folder.glob(f"*/*/{RECORD}")]})
    return collect(measured) if measured else []


def _table(runs: dict[str, list[Path]]) -> Table:
    """A row per run, of its last stage; time and memory of all its stages."""
    rows: list[list[str | float]] = []
    for name, checkpoints in runs.items():
        last = read_json(checkpoints[-1] / MANIFEST)
        account = last["accounting"]
        timed = [read_json(path / "run.json") for path in checkpoints if (path / "run.json").is_file()]
        peaks = [one["anonymous_bytes"]["peak"] / 1e9 for one in timed]
        rows.append([
            name, last["name"], round(account["disk_bytes"] / 1e6, 2), round(account["bits_per_expert_weight"], 3),
            round(100 * account["expert_ratio"], 1), float(f"{last['check']['kl']:.4g}"),
            round(sum(one["seconds"] for one in timed)) if timed else "-", round(max(peaks), 2) if peaks else "-",
        ])  # fmt: skip
    columns = [
        "run",
        "result",
        "MB",
        "bits per expert weight",
        "experts removed %",
        "stage's divergence",
        "seconds",
        "peak GB",
    ]
    return Table("", columns, rows)
