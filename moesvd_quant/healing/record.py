"""What is left of a healing beside the weights: its log as a table and a picture, and whether it helped."""

import csv
import io
import math
from pathlib import Path

from ..memory.files import write_text

CURVE = "loss.csv"
PICTURE = "loss.png"


def write_curve(folder: Path, history: list[dict], what: str) -> None:
    """loss.csv (step, loss, learning rate, validation perplexity) and loss.png of a training log."""
    rows: dict[tuple, dict] = {}
    for entry in history:
        row = rows.setdefault((entry.get("phase", 0), entry["step"]), {})
        row |= {key: entry[key] for key in ("loss", "learning_rate") if key in entry}
        if "eval_loss" in entry:
            row["validation_perplexity"] = math.exp(entry["eval_loss"])
    text = io.StringIO()
    columns = ("phase", "step", "loss", "learning_rate", "validation_perplexity")
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    for (phase, step), row in rows.items():
        table.writerow({"phase": phase, "step": step} | {key: f"{value:.6g}" for key, value in row.items()})
    write_text(folder / CURVE, text.getvalue())
    _draw(folder / PICTURE, list(rows.values()), what)


def _draw(file: Path, rows: list[dict], what: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4))
    for key, style in (("loss", dict(alpha=0.5, linewidth=1)), ("validation_perplexity", dict(marker="o"))):
        points = [(i, row[key]) for i, row in enumerate(rows) if key in row]
        if points:
            target = axis if key == "loss" else axis.twinx()
            target.plot(*zip(*points), color="tab:blue" if key == "loss" else "tab:red", **style)
            target.set_ylabel(what if key == "loss" else "validation perplexity")
    axis.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(file, metadata={"Software": None})
    plt.close(figure)
