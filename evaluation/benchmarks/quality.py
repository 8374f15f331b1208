"""What is claimed of perplexity against bytes, measured in one table with its baselines: `make bench-quality`."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from moesvd_quant.cli.common import progress_bars
from moesvd_quant.comparison.bench import compare, written
from moesvd_quant.evaluation.benchmarks.bars import Bar, verdict
from moesvd_quant.evaluation.benchmarks.decomposition_time import decomposition_bars
from moesvd_quant.evaluation.benchmarks.increases import SEEDS, Increases
from moesvd_quant.evaluation.benchmarks.matrix_bars import factor_bar, rank_bars
from moesvd_quant.evaluation.table import Table, render
from moesvd_quant.model.named import resolve_device, resolve_model
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.recipe.texts import named_texts
from moesvd_quant.run.run import Run
from moesvd_quant.run.threads import sync_threads

RATIOS = (0.2, 0.4, 0.6)
BUDGETS = (3.32, 2.28, 1.5, 1.0)  # bits per original expert weight; the first two are those of 3 and of 2 bit GPTQ
RESEEDED = ("gptq2", "fit@2.28", "fit-grids@2.28", "fit@1.5", "fit-grids@1.5", "gptq-fit@1.5")
# What `fit` may lose beside itself on grids alone: on calibrated text, and on each other one.
OF_GRIDS = {3.32: (0.8, 1.0), 2.28: (0.6, 0.6), 1.5: (0.75, 0.65), 1.0: (0.65, 0.65)}


def percent(ratio: float) -> int:
    return round(100 * ratio)


def recipes() -> dict[str, tuple[str, list[str]]]:
    """{name of a run: (shipped recipe, overrides)}."""
    made = {}
    for ratio in RATIOS:
        for name, recipe in (("svd", "svd"), ("svd-llm", "svd-llm"), ("d2", "d2-paper")):
            made[f"{name}{percent(ratio)}"] = recipe, [f"{'d2' if name == 'd2' else 'svd'}.ratio={ratio}"]
    made |= {name: (name, []) for name in ("gptq3", "gptq2", "trellis3", "trellis2")}
    for bits in BUDGETS:
        made |= {f"{name}@{bits}": (name, [f"budget={bits}bpw"]) for name in ("fit", "gptq-fit")}
        made[f"fit-grids@{bits}"] = "fit", [f"budget={bits}bpw", "limits.formats=[grid]"]
    for seed in SEEDS:
        made |= {f"{name}~{seed}": (made[name][0], [*made[name][1], f"seed={seed}"]) for name in RESEEDED}
    return made


def bars_of(found: Increases) -> list[Bar]:
    """The claims that perplexities decide."""
    bars = []
    for ratio in RATIOS:
        for kind, texts in (("calibrated", found.seen), ("uncalibrated", found.unseen)):
            for base in ("svd-llm", "d2"):
                claim = f"svd, {ratio:.0%} removed, against {base}, {kind} text"
                bars.append(Bar(claim, found.over(f"svd{percent(ratio)}", f"{base}{percent(ratio)}", texts), 1 / 3))
    for bits, limit in zip(BUDGETS[1:], (0.3, 0.8, 2.0)):
        figure = found.over(f"fit@{bits}", "gptq2", found.seen)
        bars.append(Bar(f"fit at {bits} bits against 2 bit GPTQ", figure, limit))
    for bits in BUDGETS:
        figure = found.over(f"fit@{bits}", f"gptq-fit@{bits}", found.seen)
        bars.append(Bar(f"fit at {bits} bits against widths allocated alone", figure, 1.0 if bits > 1.5 else 0.6))
    for bits, (seen, unseen) in OF_GRIDS.items():
        for texts, limit in ((found.seen, seen), *(([text], unseen) for text in found.unseen)):
            figure = found.over(f"fit@{bits}", f"fit-grids@{bits}", texts)
            bars.append(Bar(f"fit at {bits} bits against fit on grids, {', '.join(texts)}", figure, limit))
    for name, base, limit in (("trellis2", "gptq2", 0.5), ("trellis3", "gptq3", 0.7)):
        bars.append(Bar(f"{name} against {base}", found.over(name, base, found.seen), limit))
    for text in (*found.seen, *found.unseen):
        bars.append(Bar(f"fit at 1.0 bits against gptq2, {text}", found.over("fit@1.0", "gptq2", [text]), 1.0))
    for bits, base in zip(BUDGETS, ("gptq3", "gptq2")):
        for text in found.unseen:
            claim = f"fit at {bits} bits against {base}, uncalibrated {text}"
            bars.append(Bar(claim, found.over(f"fit@{bits}", base, [text]), 1.0))
    return bars


def main(
    model: Annotated[str, typer.Option(help="Hugging Face folder, hub name, or `reference`.")] = "reference",
    seen: Annotated[list[str] | None, typer.Option(help="Text of the calibrated kind; repeat it.")] = None,
    unseen: Annotated[list[str] | None, typer.Option(help="Text unlike the calibration; repeat it.")] = None,
    calibration: Annotated[str, typer.Option(help="Calibration texts, joined by commas.")] = "mixture",
    samples: Annotated[int, typer.Option(help="Windows of calibration text.")] = 256,
    self_written: Annotated[float, typer.Option(help="Share of them that the model writes; for baselines, too.")] = 0.5,
    length: Annotated[int | None, typer.Option(help="Tokens per window.")] = None,
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("quality-out"),
    device: str = "auto",
) -> None:
    """Every run, one table, one plot, and whether each bar is met. What is finished stays; a second call goes on."""
    sync_threads()
    texts, apart = named_texts(seen or ["wikitext2", "ptb"]), named_texts(unseen or ["code"])
    given = [f"calibration.dataset={calibration}", f"calibration.samples={samples}"]
    given += [f"calibration.length={length or 'auto'}", f"calibration.self_written={self_written}"]
    files = written(recipes(), out / "recipes", given)
    folder = resolve_model(model)
    with progress_bars() as report:
        paths = [str(file) for file in files.values()]
        everything = texts | apart
        records, _ = compare(folder, paths, out, everything, length, (), resolve_device(device), report)
    named = dict(zip(["original", *files], records))
    job = Run(load_recipe(str(files["fit@1.5"])), folder, out / "tables", resolve_device(device))
    bars = verdict(
        [
            *bars_of(Increases(named, list(texts), list(apart), RESEEDED)),
            *rank_bars(job, BUDGETS),
            factor_bar(job),
            *decomposition_bars(device=resolve_device(device)),
        ]
    )
    columns = ["run", "disk MB", "bits/expert weight", *everything]
    figures = Table("", columns, [_row(*item, everything) for item in named.items()])
    text = f"{render(figures, 'markdown')}\n{bars.title}\n\n{render(bars, 'markdown')}"
    (out / "quality.md").write_text(text)
    print(text, end="")


def _row(name: str, record: dict, texts: Iterable[str]) -> list[str | float]:
    size, bits = record["memory"]["disk_bytes"] / 1e6, record["accounting"]["bits_per_expert_weight"]
    return [name, round(size, 3), round(bits, 3), *(round(record["perplexity"][t]["ppl"], 3) for t in texts)]


if __name__ == "__main__":
    typer.run(main)
