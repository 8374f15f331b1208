"""MoE-SVD's Table 2 with all methods of this package on one model: `make bench-papers`."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import gcd
from pathlib import Path
from typing import Annotated

import typer

from moesvd_quant.calibration.store import fingerprint
from moesvd_quant.checkpoint.accounting import stored_tensors
from moesvd_quant.cli.common import TaskData, TaskLimit, TaskNames, progress_bars, tasks_of
from moesvd_quant.comparison.bench import compare, written
from moesvd_quant.evaluation.paper_tables import table2
from moesvd_quant.evaluation.perplexity import relative_change
from moesvd_quant.evaluation.speed import measure, open_model
from moesvd_quant.evaluation.table import Table, render, save
from moesvd_quant.evaluation.task_table import task_table
from moesvd_quant.memory.files import read_json, write_json
from moesvd_quant.model.experts import find_experts
from moesvd_quant.model.named import resolve_device, resolve_model
from moesvd_quant.model.stream import StreamedModel
from moesvd_quant.planning.shares import parameters_of
from moesvd_quant.recipe.texts import named_texts
from moesvd_quant.run.threads import sync_threads

# WikiText-2 of Mixtral-8x7B, "20 %" of the paper's Table 2, for the methods that it has.
PUBLISHED = {
    "original": 3.98,
    "Wanda 2:4": 4.72,
    "SparseGPT 2:4": 4.61,
    "ASVD": 9.44,
    "SVD-LLM": 13.45,
    "LoSparse": 953.51,
    "MoE-I²": 18.80,
    "MC-SMoE": 1341.36,
    "MoE-SVD": 4.86,
    "MoE-SVD†": 4.31,
}
LOW_RANK = 0.05  # LoSparse's share of factors
SPEED = "speed.json"


@dataclass(frozen=True)
class Shape:
    """What a model consists of, for methods that leave out whole experts or layers. share: of its parameters in routed
    experts; layers: that have any."""

    share: float
    layers: int


@dataclass(frozen=True)
class Training:
    """How the rows that train are trained. dataset: None: on the calibration text."""

    dataset: str | None
    steps: int
    batch: int

    def options(self) -> list[str]:
        """Overrides of a stage that trains."""
        given = {"dataset": self.dataset or "calibration", "length": "auto", "steps": self.steps, "batch": self.batch}
        return [f"{key}={value}" for key, value in given.items()] + [f"microbatch={gcd(self.batch, 4)}"]


def shape_of(folder: Path) -> Shape:
    model = StreamedModel(folder)
    parameters = sum(tensor.numel() for tensor in stored_tensors(model.model).values())  # tied ones once
    layers = sum(any(True for _ in find_experts(layer)) for layer in model.layers)
    return Shape(parameters_of(model) / parameters, layers)


def methods(ratio: float, shape: Shape, training: Training) -> dict[str, tuple[str | dict, list[str]]]:
    """{method: (recipe, overrides)} in the order of the paper's table. All remove `ratio` of the whole model, or the
    number of experts or layers that is nearest; 2:4 removes half of what it applies to, as in the paper."""
    experts = min(ratio / shape.share, 0.99)
    layers = min(max(round(experts * shape.layers), 1), shape.layers - 1)
    svd, prune = [f"svd.ratio={ratio}", "svd.ratio_of=model"], [f"prune.ratio={experts}"]
    lora, losparse = ([f"{stage}.{given}" for given in training.options()] for stage in ("lora", "losparse"))
    lora.append("lora.frozen=stored")
    losparse += [f"losparse.rest={1 - experts - LOW_RANK}", f"losparse.low_rank={LOW_RANK}"]
    halves = experts / 2, 1 - (1 - experts) / (1 - experts / 2)  # of the experts, and of what is left of them
    moe_i2 = [{"prune": {"ratio": halves[0], "by": "reconstruction"}}]
    moe_i2 += [{"svd": {"method": "plain", "ranks": "importance", "ratio": halves[1]}}]
    return {
        "Wanda 2:4": ("wanda", []),
        "SparseGPT 2:4": ("sparsegpt", []),
        "ASVD": ("asvd", svd),
        "SVD-LLM": ("svd-llm", svd),
        "FWSVD": ("fwsvd", svd),
        "OWL, ranks": ("svd-owl", svd),
        "LoSparse": ("losparse", losparse),
        "MoE-I²": ({"stages": moe_i2}, []),  # without its healing, as the table has it
        "MC-SMoE": ("mc-smoe", [f"merge.ratio={experts}"]),
        "MoE-Compression, experts": ("reap", [*prune, "prune.by=weight"]),
        "MoE-Compression, layers": ("layer-drop", [f"drop.layers={layers}"]),
        "NAEE": ("naee", prune),
        "REAP": ("reap", prune),
        "REAM": ("ream", [f"merge.ratio={experts}"]),
        "MoE-Slimming": ("slim", [f"slim.ratio={experts}"]),
        "D2-MoE": ("d2-paper", [f"d2.ratio={ratio}", "d2.ratio_of=model"]),
        "MoE-SVD": ("moe-svd-paper", svd),
        "MoE-SVD†": ("moe-svd-dagger", [*svd, *lora]),
        "ours: global ranks": ("svd", svd),
        "ours: and error-aware": ("svd", [*svd, "svd.error_aware=true"]),
    }


def file_name(method: str) -> str:
    """Of a method's recipe and folder."""
    plain = method.replace("†", "-dagger").replace("²", "2").lower()
    return "".join(c if c.isalnum() else "-" for c in plain).strip("-").replace("--", "-")


def timed(records: dict[str, dict], out: Path, device: str, report) -> dict[str, dict]:
    """The records with tokens per second of decoding, the models taking turns; kept in OUT until one changes."""
    file, folders = out / SPEED, {name: Path(record["folder"]) for name, record in records.items()}
    prints = {name: fingerprint(folder) for name, folder in folders.items()}
    found = read_json(file) if file.is_file() else {}
    if found.get("models") != prints:
        models = {name: open_model(folder, device) for name, folder in folders.items()}
        made = measure(models, (16,), (32,), 16, 5, report)
        write_json(file, {"models": prints, **made})
        found = read_json(file)
    of = lambda name: [cell for cell in found["cells"] if cell["model"] == name]  # noqa: E731
    return {name: record | {"speed": {"cells": of(name)}} for name, record in records.items()}


def table_of(records: dict[str, dict]) -> Table:
    """Table 2 in the order of the records, which is the paper's."""
    made = table2([record | {"name": name} for name, record in records.items()])
    rows = {row[1]: row for row in made.rows}
    return Table(made.title, made.columns, [rows[name] for name in records])


def order(records: dict[str, dict], text: str) -> str:
    """Where perplexity on a text orders two methods otherwise than the paper's WikiText-2: those pairs, where the
    difference is larger than its paired 95 % interval; and how many are as in the paper, or cannot be told apart."""
    found = {name: records[name]["perplexity"][text] for name in PUBLISHED if name in records}
    other, alike, same = [], 0, 0
    for better, worse in combinations(sorted(found, key=lambda name: PUBLISHED[name]), 2):
        change = relative_change(found[worse]["window_nll"], found[better]["window_nll"])
        if change["high"] < 0:
            a, b = (f"{name} ({found[name]['ppl']:.4g}; {PUBLISHED[name]:g})" for name in (worse, better))
            other.append(f"{a} is better than {b}")
        elif change["low"] > 0:
            same += 1
        else:
            alike += 1
    pairs = len(found) * (len(found) - 1) // 2
    said = f"Of {pairs} pairs of methods that the paper has as well, {same} are ordered on {text} as there, "
    said += f"{alike} cannot be told apart here, and {len(other)} are the other way round"
    return said + (" (here; there): " + "; ".join(other) if other else "") + "."


def run(
    model: Path, out: Path, texts: dict[str, str], length: int | None, overrides: Sequence[str], ratio: float,
    training: Training, asked, device: str, report, speed: bool = True,
) -> tuple[Table, str]:  # fmt: skip
    """The table and the sentence about its order; writes OUT/papers.md and OUT/papers.json. What is finished stays."""
    chosen = methods(ratio, shape_of(model), training)
    files = written({file_name(name): how for name, how in chosen.items()}, out / "recipes", overrides)
    found, _ = compare(model, [str(file) for file in files.values()], out, texts, length, (), device, report, (), asked)
    records = dict(zip(["original", *chosen], found, strict=True))
    if speed:
        records = timed(records, out, device, report)
    made, said = table_of(records), order(records, next(iter(texts)))
    save(made, out / "papers")
    parts = [f"{made.title}\n\n{render(made, 'markdown')}", said]
    if asked.names:
        tasks = task_table([record | {"name": name} for name, record in records.items()])
        parts.append(f"{tasks.title}\n\n{render(tasks, 'markdown')}")
    (out / "papers.md").write_text("\n".join(parts) + "\n")
    return made, said


def main(
    model: Annotated[str, typer.Option(help="Hugging Face folder, hub name, or `reference`.")] = "reference",
    ratio: Annotated[float, typer.Option(help="Share of the whole model that is removed.")] = 0.2,
    seen: Annotated[list[str] | None, typer.Option(help="Text of the calibrated kind; repeat it.")] = None,
    unseen: Annotated[list[str] | None, typer.Option(help="Text unlike the calibration; repeat it.")] = None,
    calibration: Annotated[str, typer.Option(help="Calibration texts, joined by commas.")] = "mixture",
    samples: Annotated[int, typer.Option(help="Windows of calibration text.")] = 256,
    self_written: Annotated[float, typer.Option(help="Share of them that the model writes; for all methods.")] = 0.0,
    length: Annotated[int | None, typer.Option(help="Tokens per window.")] = None,
    train: Annotated[str | None, typer.Option(help="Text to heal on; default: the calibration's.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of healing.")] = 1000,
    batch: Annotated[int, typer.Option(help="Windows per step of healing.")] = 64,
    tasks: TaskNames = None,
    task_data: TaskData = None,
    limit: TaskLimit = None,
    speed: Annotated[bool, typer.Option(help="Measure tokens per second.")] = True,
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("papers-out"),
    device: str = "auto",
) -> None:
    """Every method at one ratio, calibrated alike: Table 2, and where its order differs from the paper's. What is
    finished stays; a second call goes on."""
    sync_threads()
    texts = named_texts(seen or ["wikitext2", "ptb", "c4"]) | named_texts(unseen or ["code"])
    given = [f"calibration.dataset={calibration}", f"calibration.samples={samples}"]
    given += [f"calibration.length={length or 'auto'}", f"calibration.self_written={self_written}"]
    asked, training = tasks_of(tasks, task_data, limit, False), Training(train, steps, batch)
    with progress_bars() as report:
        run(
            resolve_model(model), out, texts, length, given, ratio, training, asked, resolve_device(device), report,
            speed,
        )  # fmt: skip
    print((out / "papers.md").read_text(), end="")


if __name__ == "__main__":
    typer.run(main)
