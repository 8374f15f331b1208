"""Memory of svd -> gptq4 on synthetic models of any depth, limited and not, and whether the files are the same.

    python -m moesvd_quant.evaluation.benchmarks.scale --layers 32 --half 16 --room 0.5 --folder FOLDER

(make bench-scale).

For each model: one of `layers` layers with --memory at imports + `room` GB (limited), without a limit (unlimited), and
one of `half` layers with that limit (half). Figures are kept in FOLDER/rows.jsonl: an interrupted benchmark goes on.
Prints a table in Markdown; exit code 1 where a bar is missed.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

RUNS = ("limited", "unlimited", "half")


def run_one(model: str, out: str, room: float, overrides: list[str]) -> None:
    """In a process of its own: prints {"imports", "forecast", "peak", "seconds"} in bytes above the imports."""
    import time

    import moesvd_quant  # noqa: F401
    from moesvd_quant.memory.allocator import disable_malloc_cache
    from moesvd_quant.memory.limits import PeakMeter, anonymous_bytes
    from moesvd_quant.recipe.load import load_recipe
    from moesvd_quant.run.run import Run
    from moesvd_quant.run.threads import sync_threads

    sync_threads()
    disable_malloc_cache()
    start = anonymous_bytes()
    limit = start + int(room * 1e9) if room else None
    started = time.time()
    with PeakMeter() as meter:
        report = lambda what, done, total: print(f"{what} {done}/{total}", file=sys.stderr, flush=True)  # noqa: E731
        job = Run(load_recipe("svd-gptq4", overrides), Path(model), Path(out), report=report, memory=limit)
        forecast = job.needs().memory - start
        job.run()
    figures = {"imports": start, "forecast": forecast, "peak": meter.peak - start, "seconds": time.time() - started}
    print(json.dumps(figures))


def digest(out: Path) -> str:
    """sha256 over all files of a run but its timings."""
    paths = [p for p in sorted(out.rglob("*")) if p.is_file() and p.name not in ("run.json", ".lock")]
    made = hashlib.sha256()
    for path in paths:
        made.update(str(path.relative_to(out)).encode())
        with open(path, "rb") as file:
            made.update(hashlib.file_digest(file, "sha256").digest())
    return made.hexdigest()


def measured(model: Path, work: Path, name: str, room: float, overrides: list[str]) -> dict:
    out = work / name
    environment = os.environ | {"MOESVD_CACHE": str(work / f"cache-{name}")}
    command = [sys.executable, __file__, "--one", str(model), str(out), str(room), *overrides]
    done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, text=True, check=True)
    figures = json.loads(done.stdout.strip().splitlines()[-1]) | {"digest": digest(out)}
    for folder in (out, work / f"cache-{name}"):
        shutil.rmtree(folder)
    return figures


def rows_of(given, overrides: list[str]) -> dict[tuple[str, str], dict]:
    """{(architecture, run): figures}; what FOLDER/rows.jsonl holds is not run again."""
    from moesvd_quant.evaluation.benchmarks.synthetic import synthetic

    kept = given.folder / "rows.jsonl"
    lines = kept.read_text().splitlines() if kept.is_file() else []
    rows = {(row["model"], row["run"]): row for row in map(json.loads, lines)}
    for model in given.models:
        for run in given.runs:
            if (model, run) in rows:
                continue
            layers = given.half if run == "half" else given.layers
            folder = given.folder / f"{model}-{layers}"
            if not folder.exists():
                synthetic(folder, model, layers, **given.config)
            size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
            row = measured(folder, given.folder, f"{model}-{run}", 0 if run == "unlimited" else given.room, overrides)
            row |= {"model": model, "run": run, "layers": layers, "size": size, "room": given.room}
            rows[model, run] = row
            with open(kept, "a") as file:
                file.write(json.dumps(row) + "\n")
    return rows


def missed(rows: dict[tuple[str, str], dict], room: float) -> list[str]:
    """Bars that are missed, or not measured, in words."""
    found = []
    for model in sorted({model for model, _ in rows}):
        limited, unlimited, half = (rows.get((model, run)) for run in RUNS)
        if not limited or limited["peak"] > room * 1e9:
            found.append(f"{model}: no peak within {room} GB")
        if not limited or not unlimited or limited["digest"] != unlimited["digest"]:
            found.append(f"{model}: not shown that the limit changes nothing")
        if not limited or not half or limited["peak"] > 1.05 * half["peak"]:
            found.append(f"{model}: not shown that the peak does not grow with depth")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=3)
    parser.add_argument("--folder", type=Path, default=Path("bench-scale"))
    parser.add_argument("--models", nargs="+", default=["mixtral", "qwen3_moe"])
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=RUNS)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--half", type=int, default=16)
    parser.add_argument("--room", type=float, default=0.5, help="GB above the imports")
    parser.add_argument("--config", type=json.loads, default={}, help="JSON, for smaller models")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    if given.one:
        run_one(given.one[0], given.one[1], float(given.one[2]), given.overrides)
        return 0
    calibration = ["calibration.dataset=demo", "calibration.samples=16", "calibration.length=512"]
    rows = rows_of(given, [*(given.overrides or calibration), "evaluate.perplexity=[]"])
    print("| model | layers | on disk GB | run | peak GB | forecast GB | minutes | files |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows.values():
        figures = f"{row['peak'] / 1e9:.3f} | {row['forecast'] / 1e9:.3f} | {row['seconds'] / 60:.1f}"
        name = f"{row['model']} | {row['layers']} | {row['size'] / 1e9:.2f} | {row['run']}"
        print(f"| {name} | {figures} | {row['digest'][:12]} |")
    print("\n".join(missed(rows, given.room)) or "all bars are met")
    return bool(missed(rows, given.room))


if __name__ == "__main__":
    sys.exit(main())
