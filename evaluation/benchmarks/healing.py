"""What healing is worth, measured: `make bench-healing`. Every figure has its baseline in the same run.

python -m moesvd_quant.healing.bench MODEL... --calibrate FILES --train FILES --text name=FILE ... --out OUT

From uniform ranks at 60 % fewer expert parameters, and from the default's global ones: what comes back on other text.
Healing distils, which cannot change the original itself (its divergence from itself is zero, and so is the gradient);
because a small model may gain by any training, what comes back is measured against the original fine-tuned on the same
tokens by next-token loss where that one is better. Healing before 3-bit GPTQ, and after 2-bit GPTQ, over several seeds.
Prints tables and which bars are met.
"""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer

import moesvd_quant
from moesvd_quant.calibration.store import fingerprint
from moesvd_quant.calibration.text import joiner_of, load_documents, token_windows
from moesvd_quant.cli.common import progress_bars
from moesvd_quant.evaluation.memory import disk_bytes
from moesvd_quant.evaluation.perplexity import in_memory, perplexity
from moesvd_quant.evaluation.table import Table, render
from moesvd_quant.memory.files import read_json, write_json
from moesvd_quant.model.named import resolve_model
from moesvd_quant.model.tokenizer import load_tokenizer
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.recipe.recipe import Evaluate
from moesvd_quant.recipe.texts import named_texts
from moesvd_quant.run.run import Run
from moesvd_quant.run.threads import sync_threads

LENGTH, BATCH = 256, 8
COMMON = f"checkpointing: false, length: {LENGTH}, batch: {BATCH}, microbatch: 4, warmup: 0.1, validation: 32"
FACTORS, TUNED = "objective: distill, train: factors, lr: 0.001", "objective: lm, train: factors, lr: 0.00005"
TERMS = "objective: distill, rank: 8, lr: 0.005"
SVD_LLM, SVD = "{svd: {method: svd_llm, ratio: 0.6}}", "{svd: {ratio: 0.6}}"
SEEDED = {  # stages before healing, how it is healed, stages after it
    "svd40, gptq3": ("{svd: {ratio: 0.4}}", FACTORS, "{gptq: {bits: 3}}"),
    "svd60, gptq3": ("{svd: {ratio: 0.6}}", FACTORS, "{gptq: {bits: 3}}"),
    "gptq2": ("{gptq: {bits: 2}}", TERMS, ""),
}

Report = Callable[[str, int, int], None]


class Bench:
    """Recipes on one model: each is run under OUT once, its checkpoints evaluated on every `stride`-th window."""

    def __init__(self, model: Path, out: Path, calibrate: str, train: str, texts: dict, stride: int, report: Report):
        self.model, self.out, self.calibrate, self.train = model, out, calibrate, train
        self.texts, self.stride, self.report = texts, stride, report
        tokenizer = load_tokenizer(model)
        self.windows = {
            name: token_windows(load_documents(source), tokenizer, LENGTH, joiner_of(source))[::stride]
            for name, source in texts.items()
        }
        self.digests = {
            name: hashlib.sha256(windows.numpy().tobytes()).hexdigest() for name, windows in self.windows.items()
        }

    def lora(self, tokens: int, options: str) -> str:
        """A stage that trains on this many tokens; validated, and saved, four times."""
        steps = max(1, tokens // (LENGTH * BATCH))
        every = max(1, steps // 4)
        return f"{{lora: {{dataset: '{self.train}', steps: {steps}, validate_every: {every}, {COMMON}, {options}}}}}"

    def run(self, name: str, stages: str, seed: int = 0) -> list[Path]:
        """Folders of all checkpoints of a recipe."""
        self.out.mkdir(parents=True, exist_ok=True)
        file = self.out / f"{name}-{seed}.yaml"
        file.write_text(f"seed: {seed}\nstages: [{stages}]\n")
        wanted = [f"calibration.dataset={self.calibrate}", f"calibration.length={LENGTH}"]
        recipe = load_recipe(file, wanted)
        # What is evaluated on is refused as training text.
        recipe = recipe.model_copy(update={"evaluate": Evaluate(perplexity=self.texts, length=LENGTH)})
        return Run(recipe, self.model, self.out / f"{name}-{seed}", report=self.report).run()

    def record(self, source: Path, folder: Path | None = None) -> dict:
        """{"disk_bytes", text: nats per token} of a model; read from folder/healing-bench.json if that is of this
        model, these texts and this stride."""
        folder = folder or source
        file = folder / "healing-bench.json"
        key = {"model": fingerprint(source), "texts": self.digests, "stride": self.stride}
        if not file.is_file() or read_json(file).get("key") != key:
            folder.mkdir(parents=True, exist_ok=True)
            found: dict = {"key": key, "disk_bytes": disk_bytes(source)["total"]}
            model = moesvd_quant.load(source, dtype=torch.float32)
            for text, windows in self.windows.items():
                say = lambda done, total, text=text: self.report(f"{folder.name}: {text}", done, total)  # noqa: E731
                found[text] = perplexity(in_memory(model), windows, progress=say).nll
            write_json(file, found)
        return read_json(file)


def recovery(original: dict, compressed: dict, tuned: dict, healed: dict, text: str) -> float:
    """Share of the lost log-perplexity that came back: 1 - (healed - tuned original) / (compressed - original).

    Where training made the original worse, the untouched one takes the tuned one's place: the stricter measure.
    """
    return 1 - (healed[text] - min(tuned[text], original[text])) / (compressed[text] - original[text])


def spread(values: list[float]) -> float:
    """Largest minus smallest."""
    return max(values) - min(values)


def row(label: str, record: dict, texts) -> list:
    return [label, round(record["disk_bytes"] / 1e6, 3), *(round(math.exp(record[text]), 2) for text in texts)]


def from_60_percent(bench: Bench, tokens: int) -> tuple[Table, list[str]]:
    """The table and the bars of healing from 60 % fewer expert parameters."""
    texts, first = list(bench.texts), next(iter(bench.texts))
    original = bench.record(bench.model, bench.out / "00-original")
    tuned = bench.record(*bench.run("tuned", bench.lora(tokens, TUNED)))
    rows = [row("original", original, texts), row("original, fine-tuned", tuned, texts)]
    bars = []
    for name, stage in (("svd-llm60", SVD_LLM), ("svd60", SVD)):
        before, after = map(bench.record, bench.run(name, f"{stage}, {bench.lora(tokens, FACTORS)}"))
        rows += [row(name, before, texts), row(f"{name}, healed", after, texts)]
        share = recovery(original, before, tuned, after, first)
        worse = [text for text in texts if after[text] > before[text]]
        bars.append(f"{name}: {share:.1%} of the lost log-perplexity on {first} came back (bar for svd-llm60: 50 %)")
        bars.append(f"{name}: {'worse than before healing on ' + ', '.join(worse) if worse else 'no text got worse'}")
    return Table("healing", ["method", "disk MB", *texts], rows), bars


def over_seeds(bench: Bench, tokens: int, seeds: int) -> tuple[Table, list[str]]:
    """The table and the bars of healing around GPTQ."""
    texts, first = list(bench.texts), next(iter(bench.texts))
    rows, bars = [], []
    for name, (before, how, after) in SEEDED.items():
        found = []
        for kind, healing in (("plain", ""), ("healed", bench.lora(tokens, how))):
            stages = ", ".join(filter(None, (before, healing, after)))
            label = f"{name.replace(', ', '-')}-{kind}"
            made = [bench.record(bench.run(label, stages, seed)[-1]) for seed in range(seeds)]
            rows += [row(f"{name}, {kind}, seed {seed}", record, texts) for seed, record in enumerate(made)]
            found.append([math.exp(record[first]) for record in made])
        gain = sum(found[0]) / seeds - sum(found[1]) / seeds
        wide = max(map(spread, found))
        met = "met" if gain > 3 * wide else "missed"
        bars.append(f"{name}: healing gains {gain:.2f} of {first}, 3 times the spread is {3 * wide:.2f}: {met}")
    return Table("healing", ["method", "disk MB", *texts], rows), bars


def main(
    models: Annotated[list[str], typer.Argument(help="Model folders, or `reference`.")],
    calibrate: Annotated[str, typer.Option(help="Text to calibrate on, files joined by commas.")],
    train: Annotated[str, typer.Option(help="Text to train on.")],
    text: Annotated[list[str], typer.Option(help="Held-out text, name=file; the first one is judged by.")],
    out: Annotated[Path, typer.Option()] = Path("bench-healing"),
    tokens: Annotated[int, typer.Option(help="To train on, from 60 %; at most a million by the bar.")] = 1_000_000,
    seed_tokens: Annotated[int, typer.Option(help="To train on in the runs over seeds.")] = 250_000,
    seeds: int = 3,
    stride: Annotated[int, typer.Option(help="Evaluate on every so many windows.")] = 1,
    part: Annotated[str, typer.Option(help="all, ranks or seeds.")] = "all",
) -> None:
    sync_threads()
    for model in models:
        folder = resolve_model(model)
        with progress_bars() as report:
            bench = Bench(folder, out / Path(model).name, calibrate, train, named_texts(text), stride, report)
            made = [from_60_percent(bench, tokens)] if part in ("all", "ranks") else []
            made += [over_seeds(bench, seed_tokens, seeds)] if part in ("all", "seeds") else []
        for table, bars in made:
            print(f"\n## {Path(model).name}\n\n{render(table, 'markdown')}\n" + "\n".join(f"- {bar}" for bar in bars))
        (bench.out / "bars.json").write_text(json.dumps([bar for _, bars in made for bar in bars], indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
