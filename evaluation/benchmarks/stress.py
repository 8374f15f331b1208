"""`fit` against all else in its bytes on models that are hard to compress: `make bench-stress`."""

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import AutoTokenizer

from moesvd_quant.api import compare, compress
from moesvd_quant.calibration.text import calibration_windows
from moesvd_quant.cli.common import progress_bars
from moesvd_quant.evaluation.benchmarks.stressed import STRESSES, write_stressed
from moesvd_quant.evaluation.table import Table, render
from moesvd_quant.model.named import resolve_model

LIMIT = 1.2  # what `fit` may lose beside the best of the others
TEXT = "text"
# By bits per expert weight: what fits in these bytes, as a shipped recipe and overrides. The first one is judged.
RUNS: dict[float, dict[str, tuple[str, dict[str, Any]]]] = {
    2.3: {
        "fit": ("fit", {"budget": "2.3bpw"}),
        "gptq2": ("gptq2", {}),
        "gptq-fit": ("gptq-fit", {"budget": "2.3bpw"}),
        "trellis2": ("trellis2", {}),
        "fit-grids": ("fit", {"budget": "2.3bpw", "limits.formats": ["grid"]}),
    },
    1.5: {
        "fit": ("fit", {"budget": "1.5bpw"}),
        "trellis1.5": ("trellis2", {"gptq.bits": 1.5}),
        "fit-grids": ("fit", {"budget": "1.5bpw", "limits.formats": ["grid"]}),
    },
}


def quotient(found: dict[str, float]) -> tuple[str, float]:
    """The best of the others, and what the first one loses beside it; found: divergence from the original by run."""
    judged, *others = found
    best = min(others, key=found.__getitem__)
    return best, found[judged] / found[best]


def measure(source: Path, stress: str, out: Path, text: str, given: dict[str, Any], length: int, report) -> dict:
    """{bits: {run: mean divergence from the stressed original, nats per token}}. What is finished is used again."""
    folder = out / stress / "original"
    if not (folder / "tokenizer.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        tokenizer = AutoTokenizer.from_pretrained(source)
        ids = calibration_windows(given["calibration.dataset"], tokenizer, 32, length, seed=0)
        write_stressed(source, stress, folder, ids)
    made: dict[str, Path] = {}
    for bits, runs in RUNS.items():
        for name, (recipe, changed) in runs.items():
            overrides = {**given, **changed, "evaluate.perplexity": [], "keep": "last"}
            run = f"{name}@{bits}"
            made[run] = compress(folder, recipe, out / stress / run, overrides, report=report).folder
    found = compare(folder, made, {TEXT: text}, length=length, report=report)[TEXT]
    return {bits: {name: found[f"{name}@{bits}"].mean for name in runs} for bits, runs in RUNS.items()}


def main(
    text: Annotated[str, typer.Option(help="Text on which divergence is measured.")] = "demo",
    calibration: Annotated[str, typer.Option(help="Calibration texts, joined by commas.")] = "demo",
    samples: Annotated[int, typer.Option(help="Windows of calibration text.")] = 128,
    length: Annotated[int, typer.Option(help="Tokens per window.")] = 256,
    model: Annotated[str, typer.Option(help="A Mixtral; `reference` is the embedded one.")] = "reference",
    only: Annotated[list[str] | None, typer.Option(help="Stresses; repeat it. All of them without.")] = None,
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("stress-out"),
) -> None:
    """Each stress and size: mean divergence of every run, and `fit` beside the best of the others. Exit code 1 where
    a quotient is above the limit."""
    given: dict[str, Any] = {"calibration.dataset": calibration, "calibration.samples": samples}
    given["calibration.length"] = length
    rows: list[list[str | float]] = []
    met = True
    with progress_bars() as report:
        for stress in only or STRESSES:
            for bits, found in measure(resolve_model(model), stress, out, text, given, length, report).items():
                best, lost = quotient(found)
                met &= lost <= LIMIT
                others = ", ".join(f"{name} {value:.4f}" for name, value in list(found.items())[1:])
                rows.append([stress, bits, round(found["fit"], 4), others, best, round(lost, 2)])
    head = ["model", "bits", "fit", "others, mean KL in nats", "best of them", f"fit beside it (at most {LIMIT})"]
    print(render(Table("", head, rows), "markdown"), end="")
    raise typer.Exit(0 if met else 1)


if __name__ == "__main__":
    typer.run(main)
