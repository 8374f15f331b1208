"""The main job on the embedded model and text that every Python carries: no network, a few minutes."""

import json
import sys
from pathlib import Path

from .cli import progress_bars
from .recipe import load_recipe
from .reference import path as reference_path

RECIPES = ("gptq4", "gptq3", "gptq2", "svd", "svd-gptq4", "svd-gptq3", "moe-svd-paper")
CALIBRATION = ["calibration.dataset=demo", "calibration.samples=192", "calibration.length=256"]
EVALUATION = ["evaluate.perplexity=[demo]", "evaluate.length=256"]


def run_demo(out: Path, as_json: bool = False) -> None:
    """Runs RECIPES under `out`, evaluates every result, prints Table 8 and says where the files are."""
    from .evaluation.plot import plot_bytes
    from .evaluation.record import RECORD, evaluate, write
    from .evaluation.table import render, table8
    from .runner import Run, sync_threads

    sync_threads()
    model = reference_path()
    records = []
    with progress_bars(as_json) as report:
        original = evaluate(model, {"demo": "demo"}, 256)
        write(original, out / "00-original" / RECORD)
        records.append(original)
        for done, name in enumerate(RECIPES):
            report("recipes", done, len(RECIPES))
            run = Run(load_recipe(name, [*CALIBRATION, *EVALUATION]), model, out / name)
            folder = run.run()[-1]
            record = evaluate(folder, {"demo": "demo"}, 256)
            write(record, folder / RECORD)
            records.append(record)
        report("recipes", len(RECIPES), len(RECIPES))
    table, plot = table8(records), out / "perplexity-against-bytes.png"
    plot_bytes(records, plot)
    for form, ending in (("markdown", "md"), ("csv", "csv"), ("json", "json")):
        (out / f"table8.{ending}").write_text(render(table, form))
    if as_json:
        print(json.dumps(records))
        return
    print(render(table), end="")
    print(f"checkpoints: {out}/*/0*-*; table: {out}/table8.md, .csv, .json; plot: {plot}", file=sys.stderr)
