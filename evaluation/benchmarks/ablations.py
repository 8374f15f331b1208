"""Tables 4 to 7 of MoE-SVD on any model: `python -m moesvd_quant.ablations`, or `make bench-ablations`."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
import yaml

from moesvd_quant.cli.common import TaskData, TaskLimit, TaskNames, progress_bars, tasks_of
from moesvd_quant.comparison.bench import compare
from moesvd_quant.errors import ModelError
from moesvd_quant.evaluation.table import Table, render
from moesvd_quant.evaluation.task_table import task_table
from moesvd_quant.model.experts import expert_count, find_experts
from moesvd_quant.model.named import resolve_device, resolve_model
from moesvd_quant.model.stream import StreamedModel
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.recipe.tasks import NO_TASKS, Tasks
from moesvd_quant.recipe.texts import named_texts
from moesvd_quant.run.plan import plan_stages
from moesvd_quant.run.run import Run
from moesvd_quant.run.threads import sync_threads
from moesvd_quant.runtime.modeling_moesvd import MANIFEST

OWN = {"share": "none"}
METRICS = ("f", "p", "a", "fp", "fa", "pa", "fpa")
TITLES = {
    4: "Table 4: how layers are chosen",
    5: "Table 5: factors of the sensitivity, own factors for each expert",
    6: "Table 6: left factors trimmed",
    7: "Table 7: calibration text",
}


def rows_of(number: int, ratio: float, experts: int, calibrations: Sequence[str]) -> dict[str, tuple[dict, str]]:
    """{label: (options of stage svd, calibration text)} of a table.

    Table 5 shares nothing: its figure for all factors, 8.67, is that of Table 4's row without sharing.
    """
    first, paper = calibrations[0], {"method": "moe_svd", "ratio": ratio}
    if number == 4:
        return {
            "SVD, all layers": (paper | OWN | {"select": "uniform"}, first),
            "SVD, layers by OWL": (paper | OWN | {"select": "owl"}, first),
            "SVD, layers by sensitivity": (paper | OWN, first),
            "MoE-SVD": (paper | {"trim_u": max(experts - 2, 0)}, first),
        }
    if number == 5:
        return {"·".join(metric): (paper | OWN | {"select": metric}, first) for metric in METRICS}
    if number == 6:
        return {f"{trimmed} of {experts}": (paper | {"trim_u": trimmed}, first) for trimmed in range(experts)}
    return {"+".join(Path(p).name.split(".")[0] for p in text.split(",")): (paper, text) for text in calibrations}


def run_table(
    number: int, model: Path, out: Path, texts: dict[str, str], ratio: float, experts: int, calibrations: Sequence[str],
    samples: int, length: int | None, device: str, report, tasks: Tasks = NO_TASKS,
) -> Table:  # fmt: skip
    """Runs the recipes of a table under OUT; what each removed, and from which layers, perplexity on each text, and
    accuracy in each task."""
    out.mkdir(parents=True, exist_ok=True)
    rows = rows_of(number, ratio, experts, calibrations)
    files: dict[str, str] = {}  # by what a recipe will do: rows that choose the same layers are run once
    file_of: dict[str, str] = {}
    for done, (label, (options, text)) in enumerate(rows.items()):
        report("plans", done, len(rows))
        calibration = {"dataset": text, "samples": samples, "length": length or "auto"}
        content = yaml.safe_dump({"calibration": calibration, "stages": [{"svd": options}]})
        file = out / f"svd-{hashlib.sha256(content.encode()).hexdigest()[:12]}.yaml"
        file.write_text(content)
        run = Run(load_recipe(file), model, out / file.stem, device, report)
        rest = {key: value for key, value in options.items() if key != "select"}
        layout = plan_stages(run)[-1]["layout"]["experts"]
        file_of[label] = files.setdefault(json.dumps([text, rest, layout]), str(file))
    report("plans", len(rows), len(rows))
    records, _ = compare(model, list(files.values()), out, texts, length, (), device, report, (), tasks)
    record_of = dict(zip(files.values(), records[1:]))
    columns = ["", "experts removed %", "layers decomposed", *texts, *task_table(records[:1]).columns[1:]]
    made = [_row("original", records[0], "none", texts)]
    for label, name in file_of.items():
        made.append(_row(label, record_of[name], _decomposed(out / Path(name).stem), texts))
    return Table(f"{TITLES[number]} ({round(ratio * 100)} % of expert parameters removed)", columns, made)


def _row(label: str, record: dict, layers: str, texts) -> list[str | float]:
    figures = [float(f"{record['perplexity'][text]['ppl']:.5g}") for text in texts]
    accuracies = [cell for row in task_table([record]).rows for cell in row[1:]]
    return [label, round(100 * record["accounting"]["expert_ratio"], 2), layers, *figures, *accuracies]


def _decomposed(run: Path) -> str:
    """Numbers of the layers that a run decomposed; with its projections where not all are."""
    (manifest,) = run.glob(f"0*-svd/{MANIFEST}")
    chosen = [(path, d["decomposed"]) for path, d in json.loads(manifest.read_text())["decisions"].items()]
    most = max(len(names) for _, names in chosen)
    found = []
    for path, names in chosen:
        number = next(part for part in path.split(".") if part.isdigit())
        if names:
            found.append(number if len(names) == most else f"{number} ({', '.join(names)})")
    return " ".join(found)


def experts_of(folder: Path) -> int:
    """How many routed experts each layer has. ModelError where there are none, or not as many in each layer."""
    layers = StreamedModel(folder).layers
    counts = {expert_count(experts) for layer in layers for _, experts in find_experts(layer)}
    if len(counts) != 1:
        raise ModelError(f"{folder}: layers have {sorted(counts) or 'no'} experts; these tables need one number")
    return counts.pop()


def main(
    table: Annotated[list[int] | None, typer.Option(help="4, 5, 6 or 7; all by default.")] = None,
    model: Annotated[str, typer.Option(help="Hugging Face folder, hub name, or `reference`.")] = "reference",
    text: Annotated[list[str] | None, typer.Option(help="Known name, file, or name=file; repeat it.")] = None,
    calibration: Annotated[list[str] | None, typer.Option(help="Calibration text; repeated: rows of Table 7.")] = None,
    ratio: Annotated[list[float] | None, typer.Option(help="Fraction of expert parameters removed.")] = None,
    samples: Annotated[int, typer.Option(help="Windows of calibration text.")] = 256,
    length: Annotated[int | None, typer.Option(help="Tokens per window.")] = None,
    tasks: TaskNames = None,
    task_data: TaskData = None,
    limit: TaskLimit = None,
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("ablations-out"),
    device: str = "auto",
) -> None:
    """MoE-SVD's Tables 4 to 7 on a model; a table that was interrupted goes on."""
    sync_threads()
    folder, texts = resolve_model(model), named_texts(text or ["wikitext2", "ptb", "c4"])
    experts = experts_of(folder)
    for number in table or sorted(TITLES):
        if number not in TITLES:
            raise typer.BadParameter(f"table {number}: give {', '.join(map(str, TITLES))}")
        for share in ratio or [0.2]:
            with progress_bars() as report:
                given = calibration or ["wikitext2", "c4"]
                made = run_table(
                    number, folder, out, texts, share, experts, given, samples, length, resolve_device(device), report,
                    tasks_of(tasks, task_data, limit, False),
                )  # fmt: skip
            name = f"table{number}-{round(share * 100)}"
            (out / f"{name}.md").write_text(render(made, "markdown"))
            print(f"{made.title}\n\n{render(made, 'markdown')}\n{out / name}.md", flush=True)


if __name__ == "__main__":
    typer.run(main)
