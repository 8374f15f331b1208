"""What is claimed of perplexity against bytes, measured in one table with its baselines: `make bench-quality`."""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, geometric_mean, median, stdev
from typing import Annotated, Literal

import torch
import typer

from moesvd_quant.checkpoint.accounting import account
from moesvd_quant.checkpoint.layout import layout_of
from moesvd_quant.cli.common import progress_bars
from moesvd_quant.comparison.bench import compare, written
from moesvd_quant.decompose.whitening import balance, gram_root, whitened_directions, whitened_error, whitened_svd
from moesvd_quant.evaluation.table import Table, render
from moesvd_quant.model.experts import dense_weight, expert_count, find_experts, shapes_of
from moesvd_quant.model.named import resolve_device, resolve_model
from moesvd_quant.planning.allocation import allowed_storages
from moesvd_quant.planning.choices import choices_of
from moesvd_quant.planning.context import Context, expert_grams
from moesvd_quant.planning.knapsack import MAX_RANKS, RANK_STEP, allocate
from moesvd_quant.quantize.factors import quantize_factors
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.recipe.texts import named_texts
from moesvd_quant.run.run import Run
from moesvd_quant.run.threads import sync_threads
from moesvd_quant.stages.gptq import Gptq

RATIOS = (0.2, 0.4, 0.6)
BUDGETS = (3.32, 2.28, 1.5, 1.0)  # bits per original expert weight; the first two are those of 3 and of 2 bit GPTQ
SEEDS = (1, 2)  # of the calibration, besides 0
RESEEDED = ("gptq2", "fit@2.28", "fit-grids@2.28", "fit@1.5", "fit-grids@1.5", "gptq-fit@1.5")
# What `fit` may lose beside itself on grids alone: on calibrated text, and on each other one.
OF_GRIDS = {3.32: (0.8, 1.0), 2.28: (0.6, 0.6), 1.5: (0.75, 0.65), 1.0: (0.65, 0.65)}
EQUAL = 0.002  # nats per token below which a difference says nothing, whatever the seeds say


@dataclass(frozen=True)
class Bar:
    """A claim: `figure` is to be at most `limit`."""

    claim: str
    figure: float
    limit: float

    @property
    def met(self) -> bool:
        return self.figure <= self.limit


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


class Increases:
    """Increase in log-perplexity over the original, in nats per token, by run and text."""

    def __init__(self, records: dict[str, dict], seen: Sequence[str], unseen: Sequence[str]):
        self.seen, self.unseen = list(seen), list(unseen)
        nll = {name: {text: found["nll"] for text, found in r["perplexity"].items()} for name, r in records.items()}
        self._nll, self._original = nll, nll["original"]

    def on(self, name: str, texts: Sequence[str]) -> float:
        """The mean over some texts."""
        return fmean(self._nll[name][text] - self._original[text] for text in texts)

    def spread(self, texts: Sequence[str], repeated: Sequence[str] = RESEEDED) -> float:
        """The largest standard deviation over calibration seeds among the runs that were repeated."""
        runs = ([name, *(f"{name}~{seed}" for seed in SEEDS)] for name in repeated)
        return max(stdev(self.on(run, texts) for run in names) for names in runs)

    def over(self, name: str, base: str, texts: Sequence[str]) -> float:
        """Quotient of the increases of two runs; differences that count as equal give at most 1."""
        mine, other = self.on(name, texts), self.on(base, texts)
        equal = abs(mine - other) <= max(EQUAL, 2 * self.spread(texts))
        quotient = mine / other if other > 0 else math.inf
        return min(1.0, quotient) if equal else quotient


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


def rank_bars(job: Run) -> list[Bar]:
    """Few distinct choices in a group keep nearly all that free ones gain over a single one, by forecast errors."""
    parent, options = job.meta, {stage.name: stage for stage in job.recipe.stages}
    gptq = options["gptq"]
    context = Context(parent, job.statistics, options["svd"], job.recipe.seed, job.device, packing=gptq)
    tables = choices_of(context, allowed_storages(context), ranks=True).tables
    weights = account(parent, layout_of(parent)).original_expert_params
    bars = []
    for bits in BUDGETS:
        one, few = (allocate(tables, bits * weights / 8, distinct=n).error for n in (1, MAX_RANKS))
        free = allocate(tables, bits * weights / 8, distinct=10**6).error
        bars.append(Bar(f"gain lost by {MAX_RANKS} distinct ranks, {bits} bits", (few - free) / (one - free), 0.1))
    return bars


def factor_bar(job: Run, ratio: float = 0.4, bits: Literal[2, 3, 4] = 3) -> Bar:
    """Error of quantized factors beyond truncation, as a geometric mean over matrices, relative to quantizing U Sigma
    and V as a singular value decomposition gives them."""
    quotients = []
    for index, found in enumerate(job.statistics.layers()):
        layer = job.meta.load_layer(index)
        for path, experts in find_experts(layer):
            grams = expert_grams(found, path, job.device)
            for name, (out, in_features) in shapes_of(experts).items():
                rank = round((1 - ratio) * out * in_features / (out + in_features) / RANK_STEP) * RANK_STEP
                for expert in range(expert_count(experts)):
                    weight = dense_weight(experts, name, expert)
                    quotients.append(excess_quotient(weight, grams[name][expert], rank, bits))
        job.meta.drop_layer(index)
    return Bar(f"{bits} bit factors, error beyond truncation, against U Sigma and V", geometric_mean(quotients), 0.6)


def excess_quotient(weight: torch.Tensor, gram: torch.Tensor, rank: int, bits: Literal[2, 3, 4]) -> float:
    """Of one matrix (out, in) and the Gram matrix (in, in) of its inputs."""
    stage = Gptq(bits=bits)
    codec, (storage,) = stage.codec(), stage.storages()
    forms = {"right": codec.form(storage, weight.shape[1], "right"), "left": codec.form(storage, rank, "left")}
    left, right = whitened_svd(weight, gram, rank)
    (mine,), (rights,) = quantize_factors([weight], [gram], [left], [right], [0], [0], forms, codec, 0)
    _, basis, plain = (found.double() for found in whitened_directions(weight, gram, rank))
    sigma = (plain @ gram.double() * plain).sum(1).sqrt()
    v = plain / sigma[:, None]
    naive = codec.pack(basis * sigma, codec.inputs(v @ gram.double() @ v.T, forms["left"]), forms["left"]).dense()
    naive = naive @ codec.pack(v, codec.inputs(gram, forms["right"]), forms["right"]).dense()
    truncated = whitened_error(weight, left @ right, gram)
    return (whitened_error(weight, mine.dense() @ rights.dense(), gram) - truncated) / (
        whitened_error(weight, naive, gram) - truncated
    )


def decomposition_bars(inner: int = 3584, hidden: int = 1024, repeats: int = 5, device: str = "cpu") -> list[Bar]:
    """Time of all whitened singular values and the factors of a third of the rank, relative to torch.linalg.svd of the
    whitened matrix in double and in single precision (its root of the Gram matrix not counted), at Mixtral's shapes
    reduced to a quarter; of one matrix, and of an expert, whose gate and up are one for us.

    RuntimeError where singular values differ by more than 1 %.
    """
    limit, bars = 1 / 10 if device.startswith("cuda") else 1 / 3, []
    down, gate, gate_up = (hidden, inner), (inner, hidden), (2 * inner, hidden)
    mine, theirs = _decomposition_times((down, gate, gate_up), repeats, device)
    for dtype in (torch.float64, torch.float32):
        ours = [mine[down], mine[gate], mine[gate_up] + mine[down]]
        svd = [theirs[down, dtype], theirs[gate, dtype], 2 * theirs[gate, dtype] + theirs[down, dtype]]
        for what, time_of, base in zip((f"{hidden} x {inner}", f"{inner} x {hidden}", "an expert"), ours, svd):
            claim = f"time to decompose {what} against torch.linalg.svd in {str(dtype)[6:]}"
            bars.append(Bar(claim, time_of / base, limit))
    return bars


def _decomposition_times(shapes, repeats: int, device: str) -> tuple[dict, dict]:
    """Seconds, median of `repeats`, by shape, and of torch.linalg.svd by (shape, precision)."""
    generator = torch.Generator().manual_seed(0)
    mine: dict = {shape: [] for shape in shapes}
    theirs: dict = {(shape, dtype): [] for shape in shapes for dtype in (torch.float64, torch.float32)}
    for out, in_features in shapes:
        weight = torch.randn(out, in_features, generator=generator).to(device)
        inputs = torch.randn(2 * in_features, in_features, generator=generator) * torch.rand(in_features)
        gram = (inputs.T @ inputs).to(device)
        whitened = weight.double() @ gram_root(gram)
        for _ in range(repeats):
            started = _now(device)
            spectrum, *factors = whitened_directions(weight, gram, min(out, in_features) // 3)
            balance(*factors)
            mine[out, in_features].append(_now(device) - started)
            for dtype in (torch.float64, torch.float32):
                given, started = whitened.to(dtype), _now(device)
                values = torch.linalg.svd(given, full_matrices=False)[1].double()
                theirs[(out, in_features), dtype].append(_now(device) - started)
        if not torch.allclose(spectrum.sqrt(), values, rtol=0.01, atol=0.01 * float(values.max())):
            raise RuntimeError(f"{out} x {in_features}: singular values differ by more than 1 %; this is a defect")
    return {key: median(times) for key, times in mine.items()}, {key: median(times) for key, times in theirs.items()}


def _now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def verdict(bars: list[Bar]) -> Table:
    rows: list[list[str | float]] = [
        [bar.claim, round(bar.figure, 3), round(bar.limit, 3), "met" if bar.met else "missed"] for bar in bars
    ]
    return Table("Bars: increase in log-perplexity relative to a baseline", ["claim", "figure", "at most", ""], rows)


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
            *bars_of(Increases(named, list(texts), list(apart))),
            *rank_bars(job),
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
