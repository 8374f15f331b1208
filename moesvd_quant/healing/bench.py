"""What healing is worth, measured: `make bench-healing`. Every figure has its baseline in the same run.

python -m moesvd_quant.healing.bench MODEL... --train FILES --text name=FILE ... --out OUT

From uniform ranks at 60 % fewer expert parameters, and from the default's global ones: what comes back on other text,
measured against the original that was fine-tuned on the same tokens in the same way (a small model gains by any
training). Healing before 3-bit GPTQ, and after 2-bit GPTQ, over several seeds. Prints tables and which bars are met.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from ..bench import measured
from ..cli.common import progress_bars, resolve_model
from ..evaluation.table import Table, render
from ..recipe import Evaluate, load_recipe, named_texts
from ..runner import Run, sync_threads

LENGTH = 256
BATCH = 16
METHOD = "checkpointing: false, batch: 16, microbatch: 4"
SVD_LLM, SVD = "{svd: {method: uniform, ratio: 0.6}}", "{svd: {ratio: 0.6}}"

Report = Callable[[str, int, int], None]


class Bench:
    """Recipes on one model: each is run under OUT once, its checkpoints evaluated on `texts`."""

    def __init__(self, model: Path, out: Path, train: str, texts: dict[str, str], heal: str, report: Report):
        self.model, self.out, self.train, self.texts, self.report = model, out, train, texts, report
        self.heal = heal

    def lora(self, tokens: int, more: str = "") -> str:
        steps = max(1, tokens // (LENGTH * BATCH))
        every = max(1, steps // 4)
        return f"{{lora: {{steps: {steps}, validate_every: {every}, {METHOD}, {self.heal}{more}}}}}"

    def run(self, name: str, stages: str, seed: int = 0) -> list[dict]:
        """Records of all checkpoints of a recipe."""
        self.out.mkdir(parents=True, exist_ok=True)
        file = self.out / f"{name}-{seed}.yaml"
        file.write_text(f"stages: [{stages}]\n")
        recipe = load_recipe(
            file,
            [f"calibration.dataset={self.train}", "calibration.samples=256", f"calibration.length={LENGTH}"],
        )
        recipe = recipe.model_copy(update={"seed": seed, "evaluate": Evaluate(perplexity=self.texts, length=LENGTH)})
        folders = Run(recipe, self.model, self.out / f"{name}-{seed}", report=self.report).run()
        return [self.record(folder, folder) for folder in folders]

    def record(self, source: Path, folder: Path) -> dict:
        return measured(source, folder, self.texts, LENGTH, "cpu", lambda *done: self.report(*done))


def nll(record: dict, text: str) -> float:
    return record["perplexity"][text]["nll"]


def recovery(original: dict, compressed: dict, tuned: dict, healed: dict, text: str) -> float:
    """Share of the lost log-perplexity that came back: 1 - (healed - tuned original) / (compressed - original)."""
    return 1 - (nll(healed, text) - nll(tuned, text)) / (nll(compressed, text) - nll(original, text))


def spread(values: list[float]) -> float:
    """Largest minus smallest."""
    return max(values) - min(values)


def row(label: str, record: dict, texts) -> list:
    size = record["memory"]["disk_bytes"] / 1e6
    return [label, round(size, 3), *(round(record["perplexity"][text]["ppl"], 2) for text in texts)]


def from_60_percent(bench: Bench, tokens: int) -> tuple[Table, list[str]]:
    """The table and the bars of healing from 60 % fewer expert parameters."""
    texts, first = list(bench.texts), next(iter(bench.texts))
    original = bench.record(bench.model, bench.out / "00-original")
    (tuned,) = bench.run("tuned", bench.lora(tokens))
    rows = [row("original", original, texts), row("original, fine-tuned", tuned, texts)]
    bars = []
    for name, stage in (("svd-llm60", SVD_LLM), ("svd60", SVD)):
        before, after = bench.run(name, f"{stage}, {bench.lora(tokens)}")
        rows += [row(name, before, texts), row(f"{name}, healed", after, texts)]
        share = recovery(original, before, tuned, after, first)
        worse = [text for text in texts if nll(after, text) > nll(before, text)]
        bars.append(f"{name}: {share:.1%} of the lost log-perplexity on {first} came back (bar for svd-llm60: 50 %)")
        bars.append(f"{name}: {'worse than before healing on ' + ', '.join(worse) if worse else 'no text got worse'}")
    return Table("healing", ["method", "disk MB", *texts], rows), bars


def over_seeds(bench: Bench, tokens: int, seeds: int) -> tuple[Table, list[str]]:
    """The table and the bars of healing around GPTQ."""
    texts, first = list(bench.texts), next(iter(bench.texts))
    pairs = {
        "svd40, gptq3": ("{svd: {ratio: 0.4}}, {gptq: {bits: 3}}", "{svd: {ratio: 0.4}}, LORA, {gptq: {bits: 3}}"),
        "gptq2": ("{gptq: {bits: 2}}", "{gptq: {bits: 2}}, LORA"),
    }
    rows, bars = [], []
    for name, stages in pairs.items():
        found = []
        for kind, recipe in zip(("plain", "healed"), stages):
            made = [
                bench.run(f"{name.replace(', ', '-')}-{kind}", recipe.replace("LORA", bench.lora(tokens)), seed)[-1]
                for seed in range(seeds)
            ]
            rows += [row(f"{name}, {kind}, seed {seed}", record, texts) for seed, record in enumerate(made)]
            found.append([math.exp(nll(record, first)) for record in made])
        gain = sum(found[0]) / seeds - sum(found[1]) / seeds
        wide = max(map(spread, found))
        met = "met" if gain > 3 * wide else "missed"
        bars.append(f"{name}: healing gains {gain:.2f} of {first}, 3 times the spread is {3 * wide:.2f}: {met}")
    return Table("healing", ["method", "disk MB", *texts], rows), bars


def main(
    models: Annotated[list[str], typer.Argument(help="Model folders, or `reference`.")],
    train: Annotated[str, typer.Option(help="Text to calibrate and train on, files joined by commas.")],
    text: Annotated[list[str], typer.Option(help="Held-out text, name=file; the first one is judged by.")],
    out: Annotated[Path, typer.Option()] = Path("bench-healing"),
    tokens: Annotated[int, typer.Option(help="To train on, from 60 %; at most a million by the bar.")] = 1_000_000,
    seed_tokens: Annotated[int, typer.Option(help="To train on in the runs over seeds.")] = 250_000,
    seeds: int = 3,
    heal: Annotated[str, typer.Option(help="Options of the stage.")] = "lr: 0.003",
    part: Annotated[str, typer.Option(help="all, ranks or seeds.")] = "all",
) -> None:
    sync_threads()
    for model in models:
        folder = resolve_model(model)
        with progress_bars() as report:
            bench = Bench(folder, out / Path(model).name, train, named_texts(text), heal, report)
            made = [from_60_percent(bench, tokens)] if part in ("all", "ranks") else []
            made += [over_seeds(bench, seed_tokens, seeds)] if part in ("all", "seeds") else []
        for table, bars in made:
            print(f"\n## {Path(model).name}\n\n{render(table, 'markdown')}\n" + "\n".join(f"- {bar}" for bar in bars))
        (bench.out / "bars.json").write_text(json.dumps([bar for _, bars in made for bar in bars], indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
