"""How well the planner's forecast ranks plans of equal bytes, against true perplexity: `make bench-forecast`."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from scipy.stats import spearmanr

from moesvd_quant.calibration.text import joiner_of, load_documents, token_windows
from moesvd_quant.checkpoint.accounting import account, planned_model
from moesvd_quant.checkpoint.layout import layout_of
from moesvd_quant.cli.common import progress_bars
from moesvd_quant.evaluation.benchmarks.bars import Bar
from moesvd_quant.evaluation.perplexity import in_memory, perplexity
from moesvd_quant.evaluation.plot import plot_ranking
from moesvd_quant.memory.files import write_json
from moesvd_quant.model.load import load
from moesvd_quant.model.named import resolve_device, resolve_model
from moesvd_quant.model.stream import StreamedModel
from moesvd_quant.model.tokenizer import load_tokenizer
from moesvd_quant.planning.allocation import allowed_storages, forecast_error, plan_of
from moesvd_quant.planning.choices import choices_of
from moesvd_quant.planning.context import Context
from moesvd_quant.planning.knapsack import Choice, Storage, Table, allocate
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.recipe.stage import Stage
from moesvd_quant.run.run import Run
from moesvd_quant.run.threads import sync_threads

BUDGETS, PLANS = (1.5, 2.3), 30
# Standard deviations of the logarithms that groups, and experts within them, are misjudged by in a random plan; drawn
# evenly between these for each plan: from hardly anything to plans that no forecast would make.
GROUPS, EXPERTS = (0.1, 2.0), (0.1, 1.0)
KEEP_WIDTH = 0.6  # chance that a group may use a width at all

Tables = dict[tuple[str, str], Table]
Choices = dict[tuple[str, str], list[Choice]]


def random_plan(tables: Tables, budget: float, draw: np.random.Generator) -> Choices:
    """Choices of all experts that fill a budget in bytes: an allocation by tables whose groups and experts are weighed
    at random, and where each group may use a random few of the widths."""
    groups, experts = draw.uniform(*GROUPS), draw.uniform(*EXPERTS)
    wrong = {}
    for key, table in tables.items():
        storages = {choice.storage for choice in table.choices if choice.rank}
        kept = {storage for storage in sorted(storages) if draw.random() < KEEP_WIDTH} or storages
        columns = [i for i, choice in enumerate(table.choices) if not choice.rank or choice.storage in kept]
        scale = np.exp(groups * draw.standard_normal() + experts * draw.standard_normal((len(table.errors), 1)))
        choices = [table.choices[i] for i in columns]
        wrong[key] = Table(choices, table.costs[columns], table.errors[:, columns] * scale)
    return allocate(wrong, budget).choices


def forecast_of(tables: Tables, choices: Choices) -> float:
    """What a plan is forecast to cost."""
    return sum(forecast_error(tables[key], chosen) for key, chosen in choices.items())


def cost_of(tables: Tables, choices: Choices) -> float:
    """Bytes of the experts of a plan."""
    return float(sum(t.costs[t.choices.index(choice)] for key, t in tables.items() for choice in choices[key]))


class Bench:
    """Plans on one model, carried out in memory by the stages, with everything but the experts as it is."""

    def __init__(self, job: Run, windows: torch.Tensor):
        self.job, self.windows = job, windows
        made = {stage.name: stage for stage in job.recipe.stages}
        # Attention is the same in all plans: it stays.
        self.svd, self.gptq = made["svd"], made["gptq"].model_copy(update={"attention": False})
        self.parent = StreamedModel(job.model, device=job.device)
        context = self._context(self.parent, self.svd)
        self.found = choices_of(context, allowed_storages(context), ranks=True)
        self.tables: Tables = self.found.tables

    def _context(self, parent: StreamedModel, stage: Stage, storages: dict | None = None) -> Context:
        job = self.job
        context = Context(parent, job.statistics, stage, job.recipe.seed, job.device, packing=self.gptq)
        return replace(context, storages=storages or {})

    def budget(self, bits: float) -> float:
        return bits * account(self.parent, layout_of(self.parent)).original_expert_params / 8

    def loss(self, choices: Choices | None) -> float:
        """Nats per token of the model after a plan, or of the original."""
        model = load(self.job.model, device=self.job.device)
        if choices is not None:
            layers = model.get_submodule(self.parent.layers_path)
            for index, run in enumerate(self._stages(choices)):
                run(layers[index])
        return perplexity(in_memory(model.float()), self.windows).nll

    def _stages(self, choices: Choices) -> Iterator[Callable]:
        """For each layer a function that does to it what stages svd and gptq do."""
        planned = plan_of(self._context(self.parent, self.svd), self.found, choices)
        made = planned_model(self.parent, planned.layout)
        factors = StreamedModel.described(made, self.parent.folder, self.parent.device, self.parent)
        first, second = self._context(self.parent, self.svd), self._context(factors, self.gptq, planned.storages)
        packed = self.gptq.plan(second)
        for index, statistics in enumerate(self.job.statistics.layers()):

            def run(layer, index=index, statistics=statistics):
                self.svd.run_layer(first, index, layer, statistics, planned)
                self.gptq.run_layer(second, index, layer, statistics, packed)

            yield run


def measured(bench: Bench, bits: float, plans: int, file: Path, report) -> list[dict]:
    """Plans at a budget and the loss of each, [{"choices": {path/projection: [[rank, [rate, format]]]}, "increase":
    nats per token}]; those that are in `file` are not measured again."""
    found: dict = json.loads(file.read_text()) if file.is_file() else {"original": bench.loss(None), "plans": []}
    draw = np.random.default_rng(0)
    for at in range(plans):
        report(f"{bits} bits: plans", at, plans)
        choices = random_plan(bench.tables, bench.budget(bits), draw)
        if at < len(found["plans"]):
            continue
        named = {"/".join(key): [[rank, [*how]] for rank, how in chosen] for key, chosen in choices.items()}
        found["plans"].append({"choices": named, "increase": bench.loss(choices) - found["original"]})
        write_json(file, found)
    return found["plans"]


def plan_from(plan: dict) -> Choices:
    """As `measured` has written them."""
    found: Choices = {}
    for name, chosen in plan["choices"].items():
        path, _, projection = name.rpartition("/")
        found[path, projection] = [Choice(rank, Storage(*storage)) for rank, storage in chosen]
    return found


def main(
    model: Annotated[str, typer.Option(help="Trained model.")] = "reference",
    text: Annotated[str, typer.Option(help="Text that perplexity is measured on.")] = "wikitext2",
    windows: Annotated[int, typer.Option(help="Windows of it, evenly over the text.")] = 48,
    calibration: Annotated[str, typer.Option(help="Calibration texts, joined by commas.")] = "mixture",
    samples: Annotated[int, typer.Option(help="Windows of calibration text.")] = 256,
    length: Annotated[int, typer.Option(help="Tokens per window.")] = 256,
    plans: Annotated[int, typer.Option(help="Random plans at each budget.")] = PLANS,
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("forecast-out"),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
) -> None:
    """Rank correlation of the forecast with the true increase at each budget, and a plot. What was measured stays:
    a second call ranks them by the forecast as it is then."""
    sync_threads()
    given = [f"calibration.dataset={calibration}", f"calibration.samples={samples}", f"calibration.length={length}"]
    recipe = load_recipe("fit-fast", [*given, "budget=1bpw", "evaluate.perplexity=[]"])
    folder = resolve_model(model)
    every = token_windows(load_documents(text), load_tokenizer(folder), length, joiner_of(text))
    chosen = every[:: max(1, len(every) // windows)][:windows]
    out.mkdir(parents=True, exist_ok=True)
    with progress_bars() as report:
        bench = Bench(Run(recipe, folder, out / "run", resolve_device(device), report), chosen)
        panels = {}
        for bits in BUDGETS:
            found = measured(bench, bits, plans, out / f"plans-{bits}.json", report)
            forecasts = [forecast_of(bench.tables, plan_from(plan)) for plan in found]
            panels[f"{bits} bits per expert weight"] = forecasts, [plan["increase"] for plan in found]
    plot_ranking(panels, out / "forecast.png")
    for title, (forecasts, increases) in panels.items():
        bar = Bar(title, -spearmanr(forecasts, increases).statistic, -0.7)
        print(f"{title}: {len(increases)} plans, rank correlation {-bar.figure:.3f}, {'met' if bar.met else 'missed'}")


if __name__ == "__main__":
    typer.run(main)
