"""Recipes over seeds and calibration sizes (Table 12 and Figure 6 of the paper): how much of a result is luck."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..evaluation.inputs import EvalSpec
from ..evaluation.paper_tables import table12
from ..evaluation.plot import plot_sweep
from ..evaluation.record import RECORD, write
from ..evaluation.table import Table, save
from ..recipe.load import load_recipe
from ..recipe.recipe import Recipe
from ..run.run import Run
from .bench import Report, cached_evaluate, folder_of, require_distinct


def sweep(
    model: Path,
    recipes: Sequence[str],
    out: Path,
    wanted: EvalSpec,
    seeds: Sequence[int],
    samples: Sequence[int] = (),
    overrides: Sequence[str] = (),
    device: str = "cpu",
    report: Report = lambda what, done, total: None,
) -> tuple[list[dict], Table]:
    """Runs each recipe with every seed and number of calibration windows (default: the recipe's own) under
    OUT/RECIPE-samplesN-seedS, and measures the results and the original.

    Writes OUT/table12.md, .csv, .json and OUT/perplexity-against-samples.png. All recipes are loaded before any runs;
    finished runs and records by the same protocol stay. Returns the records and their table.
    """
    require_distinct(recipes)
    runs = []
    for name in recipes:
        for count in samples or [load_recipe(name, overrides).calibration.samples]:
            for seed in seeds:
                given = [
                    *overrides,
                    f"calibration.samples={count}",
                    f"seed={seed}",
                    "evaluate.perplexity=[]",
                    "keep=last",
                ]
                runs.append((load_recipe(name, given), out / f"{folder_of(name)}-samples{count}-seed{seed}"))
    wanted = replace(wanted, original=model)
    records = [cached_evaluate(model, out / "00-original", wanted, device)]
    for done, (recipe, folder) in enumerate(runs):
        report("runs", done, len(runs))
        checkpoint = Run(recipe, model, folder, device, report).run()[-1]
        record = cached_evaluate(checkpoint, checkpoint, wanted, device)
        swept = {
            "method": record["name"],
            "seed": recipe.seed,
            "samples": recipe.calibration.samples,
            "recipe": recipe.name,
            "digest": _digest(recipe),
        }
        records.append(record | {"sweep": swept})
        write(records[-1], checkpoint / RECORD)
    report("runs", len(runs), len(runs))
    table = table12(records)
    save(table, out / "table12")
    if wanted.texts:
        plot_sweep(records, out / "perplexity-against-samples.png")
    return records, table


def _digest(recipe: Recipe) -> str:
    """sha256 of all that a recipe says of the result, but for the seed."""
    content = recipe.model_dump(mode="json", exclude={"name", "seed", "evaluate", "keep", "stages"})
    content["stages"] = [{stage.name: stage.model_dump(mode="json")} for stage in recipe.stages]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
