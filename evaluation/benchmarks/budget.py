"""A budget against everything else that fits in its bytes, on trained models: `make bench-budget`."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Annotated

import typer

from moesvd_quant.calibration.text import joiner_of, load_documents
from moesvd_quant.cli.common import progress_bars
from moesvd_quant.comparison.bench import compare, written
from moesvd_quant.evaluation.benchmarks.increases import EQUAL, SEEDS, Increases
from moesvd_quant.evaluation.table import Table, render
from moesvd_quant.model.named import resolve_device, resolve_model
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.recipe.texts import named_texts
from moesvd_quant.run.plan import plan_stages
from moesvd_quant.run.run import Run
from moesvd_quant.run.threads import sync_threads

BUDGETS = (1.0, 1.3, 1.5, 2.0, 2.5, 3.0, 4.0)  # bits per original expert weight
PLANNERS = ("gptq-fit", "fit")
ONE_WIDTH = (2, 3, 4)  # of plain GPTQ
WIDTHS = (2, 3, 4, 8)  # of quantized factors of one rank share
RESEEDED = (1.5, 2.5, 3.0)  # budgets that are repeated with other calibration seeds
SENSIBLE = (0.3, 0.65)  # shares of the expert parameters between which leaving them out competes with fewer bits
UNSEEN_FROM = 2.3  # bits: below, nothing is claimed of text unlike the calibration


def least_ratio(size: Callable[[float], int], wanted: int, steps: int = 6) -> float | None:
    """The ratio within SENSIBLE at which `size`, nearly a straight line, is at most `wanted` bytes, and at least 99.5 %
    of them, or after so many steps. None where the first one has fewer bytes already, or the last one more."""
    low, high = SENSIBLE
    above, below = size(low), size(high)
    if above <= wanted or below > wanted:
        return None
    for _ in range(steps):
        if below >= 0.995 * wanted:
            break
        middle = low + (high - low) * (above - 0.998 * wanted) / (above - below)
        found = size(middle)
        low, high, above, below = (middle, high, found, below) if found > wanted else (low, middle, above, found)
    return high


def fits(records: dict[str, dict], bits: float, baseline: str) -> bool:
    """Whether the experts of a run are no larger on disk than what the planner made of the budget."""
    return expert_bytes(records[baseline]) <= expert_bytes(records[f"fit@{bits}"])


def expert_bytes(record: dict) -> int:
    return record["memory"]["disk"]["experts"]


def baselines_of(records: dict[str, dict], bits: float) -> list[str]:
    """What the planner's result at a budget is compared with: widths allocated alone, the widest plain GPTQ that fits,
    and one rank share with factors of each sensible width."""
    plain = [f"gptq{width}" for width in ONE_WIDTH if fits(records, bits, f"gptq{width}")]
    uniform = [name for name in records if name.startswith("uniform") and name.endswith(f"@{bits}")]
    return [f"gptq-fit@{bits}", *plain[-1:], *uniform]


def uniform_recipes(job: Run, given: Sequence[str]) -> dict[str, tuple[str, list[str]]]:
    """One rank share for all experts (SVD-LLM's) and quantized factors, at the bytes that each budget comes to: its own
    for the experts, and everything else as a budget leaves it, in 4 bits."""

    def planned(recipe: str, own: Sequence[str]) -> dict:
        job.recipe = load_recipe(recipe, [*given, *own])
        return plan_stages(job)[-1]["accounting"]

    @cache
    def size(width: int, ratio: float) -> int:
        return planned("svd-gptq3", uniform(width, ratio))["disk_bytes"]

    made, whole = {}, planned("gptq4", [])
    for bits, width in product(BUDGETS, WIDTHS):
        wanted = whole["disk_bytes"] - whole["expert_bytes"] + int(bits * whole["original_expert_params"] / 8)
        ratio = least_ratio(partial(size, width), wanted)
        if ratio is not None:
            made[f"uniform{width}@{bits}"] = "svd-gptq3", uniform(width, ratio)
    return made


def uniform(width: int, ratio: float) -> list[str]:
    return ["svd.method=svd_llm", f"gptq.bits={width}", f"svd.ratio={ratio}"]


def verdicts(records: dict[str, dict], seen: Sequence[str], unseen: Sequence[str], budgets: Sequence[float]) -> Table:
    """Per budget and text the planner's increase in log-perplexity beside the best of its baselines; a difference of at
    most EQUAL, or twice the spread over the seeds of the runs at this budget, counts as equal."""
    found = Increases(records, seen, unseen)
    rows: list[list[str | float]] = []
    for bits in budgets:
        again = [f"{name}@{bits}" for name in PLANNERS if f"{name}@{bits}~{SEEDS[0]}" in records]
        for text in (*seen, *unseen):
            best = min(baselines_of(records, bits), key=lambda name: found.on(name, [text]))
            mine, other = found.on(f"fit@{bits}", [text]), found.on(best, [text])
            limit = max(EQUAL, 2 * found.spread([text], again)) if again else EQUAL
            claimed = text in seen or bits >= UNSEEN_FROM
            level = mine - other <= limit
            said = ("met" if level else "missed") if claimed else ("(level)" if level else "(worse)")
            rows.append([bits, text, *(round(x, 4) for x in (mine, other, mine - other, limit)), best, said])
    columns = ["bits", "text", "fit", "best other", "difference", "equal up to", "which", "at or below"]
    return Table("Increase in log-perplexity, nats per token, against the best of all baselines", columns, rows)


def beginning(source: str, size: int, file: Path) -> str:
    """The first `size` bytes of a text, written to a file; its name."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(joiner_of(source).join(load_documents(source)).encode()[:size])
    file.write_text(file.read_text(errors="ignore"))  # a character that was cut in two is none
    return str(file)


def measure(
    model: Path, out: Path, seen: dict[str, str], unseen: dict[str, str], given: Sequence[str], length: int | None,
    seeds: Sequence[int], device: str, report,
) -> tuple[dict[str, dict], Table]:  # fmt: skip
    """Records by name of every run on a model, and the verdicts; what is finished under OUT stays."""
    job = Run(load_recipe("svd-gptq3", given), model, out / "sizes", device)
    recipes: dict[str, tuple[str, list[str]]] = {f"gptq{width}": (f"gptq{width}", []) for width in ONE_WIDTH}
    recipes |= {f"{name}@{bits}": (name, [f"budget={bits}bpw"]) for name in PLANNERS for bits in BUDGETS}
    recipes |= uniform_recipes(job, given)
    for bits, seed in product(RESEEDED, seeds):
        recipes |= {f"{name}@{bits}~{seed}": (name, [f"budget={bits}bpw", f"seed={seed}"]) for name in PLANNERS}
    files = written(recipes, out / "recipes", given)
    found, _ = compare(model, [str(f) for f in files.values()], out, seen | unseen, length, (), device, report)
    records = dict(zip(["original", *files], found))
    return records, verdicts(records, list(seen), list(unseen), BUDGETS)


def figures(records: dict[str, dict]) -> Table:
    """Size and perplexities of every run, largest first; repeated ones are in the spread alone."""
    texts = list(records["original"]["perplexity"])
    by_size = sorted(records.items(), key=lambda item: -item[1]["memory"]["disk_bytes"])
    rows: list[list[str | float]] = [
        [
            name,
            round(record["memory"]["disk_bytes"] / 1e6, 3),
            round(record["accounting"]["bits_per_expert_weight"], 3),
            round(100 * record["accounting"]["expert_ratio"], 1),
            *(round(record["perplexity"][text]["ppl"], 2) for text in texts),
        ]
        for name, record in by_size
        if "~" not in name
    ]
    return Table("", ["run", "disk MB", "bits/expert weight", "experts removed %", *texts], rows)


def main(
    model: Annotated[list[str] | None, typer.Option(help="Trained model; repeat it. Default: `reference`.")] = None,
    seen: Annotated[list[str] | None, typer.Option(help="Text of the calibrated kind; repeat it.")] = None,
    unseen: Annotated[list[str] | None, typer.Option(help="Text unlike the calibration; repeat it.")] = None,
    first: Annotated[int, typer.Option(help="Bytes of each unseen text that are read.")] = 150_000,
    calibration: Annotated[str, typer.Option(help="Calibration texts, joined by commas.")] = "mixture",
    samples: Annotated[int, typer.Option(help="Windows of calibration text.")] = 256,
    length: Annotated[int | None, typer.Option(help="Tokens per window.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Further calibration seeds; default: 1 and 2.")] = None,
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("budget-out"),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
) -> None:
    """Every budget on every model: figures, and whether the planner is at or below the best of the others."""
    sync_threads()
    texts = named_texts(seen or ["wikitext2", "ptb"])
    apart = {
        name: beginning(source, first, out / "texts" / f"{name}.txt")
        for name, source in named_texts(unseen or ["code"]).items()
    }
    given = [f"calibration.dataset={calibration}", f"calibration.samples={samples}"]
    given += [f"calibration.length={length or 'auto'}", "evaluate.perplexity=[]"]
    for name in model or ["reference"]:
        folder = resolve_model(name)
        with progress_bars() as report:
            records, table = measure(
                folder, out / folder.name, texts, apart, given, length, seed or SEEDS, resolve_device(device), report
            )
        text = (
            f"# {folder.name}\n\n{render(figures(records), 'markdown')}\n{table.title}\n\n{render(table, 'markdown')}"
        )
        (out / folder.name / "budget.md").write_text(text)
        print(text)


if __name__ == "__main__":
    typer.run(main)
