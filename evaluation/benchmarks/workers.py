"""How much faster two workers with one thread each are than one, in the decomposition of a synthetic Mixtral.

    python -m moesvd_quant.evaluation.benchmarks.workers --folder FOLDER

(make bench-workers; minutes, on a machine with two free cores).

Workers are started, and have done a layer each, before the clock runs: what they cost once is not what is asked for.
One and two take turns. Prints seconds and ratios (best and median) in Markdown; exit code 1 where one is below 1.6.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from moesvd_quant.memory.pool import Pool
from moesvd_quant.run.run import Run

BAR = 1.6


def decomposition(job: Run, pool: Pool) -> Callable[[int, Path], float]:
    """seconds(layers, folder): of stage `svd` of a run that has planned, its layers written into a new folder."""
    from moesvd_quant.planning.context import LayerWork
    from moesvd_quant.run.stage_work import make_layer

    def seconds(layers: int, folder: Path) -> float:
        folder.mkdir()
        context = job.context(0)
        work = LayerWork(context, partial(make_layer, folder, job.plan(0, context.parent)))
        started = time.perf_counter()
        for _ in pool.map(work, list(range(layers)), job.device):
            pass
        taken = time.perf_counter() - started
        shutil.rmtree(folder)
        return taken

    return seconds


def main() -> int:
    from moesvd_quant.evaluation.benchmarks.synthetic import synthetic
    from moesvd_quant.recipe.load import load_recipe
    from moesvd_quant.run.output import locked

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("bench-workers"))
    parser.add_argument("--executors", nargs="+", default=["processes", "ray"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--config", type=json.loads, default={"hidden_size": 512}, help="JSON")
    given = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    os.environ.setdefault("MOESVD_CACHE", str(given.folder / "cache"))
    model, out = given.folder / "model", given.folder / "out"
    if not model.exists():
        synthetic(model, "mixtral", given.layers, **given.config)
    small = ["calibration.dataset=demo", "calibration.samples=4", "calibration.length=512", "evaluate.perplexity=[]"]
    job = Run(load_recipe("svd", small), model, out)
    with locked(out):
        job.statistics.ensure()
        job.forecasts = job._forecasts()
    folder = job.work_folder(0)
    folder.mkdir(exist_ok=True)
    print("| executor | one worker, s | two workers, s | ratio of the best | of the medians |")
    print("|---|---|---|---|---|")
    worst = float("inf")
    for executor in given.executors:
        pools = [Pool(workers, executor) for workers in (1, 2)]
        one, two = (decomposition(job, pool) for pool in pools)
        one(1, folder / "first-one"), two(2, folder / "first-two")
        rounds = range(given.rounds)
        pairs = [(one(given.layers, folder / f"one-{n}"), two(given.layers, folder / f"two-{n}")) for n in rounds]
        for pool in pools:
            pool.close()
        ones, twos = zip(*pairs)
        best, middle = min(ones) / min(twos), statistics.median(ones) / statistics.median(twos)
        worst = min(worst, best)
        seconds = " | ".join(", ".join(f"{t:.1f}" for t in times) for times in (ones, twos))
        print(f"| {executor} | {seconds} | {best:.2f} | {middle:.2f} |", flush=True)
    print(
        f"two workers are at least {worst:.2f} times as fast: the bar of {BAR} is {'met' if worst >= BAR else 'missed'}"
    )
    return worst < BAR


if __name__ == "__main__":
    sys.exit(main())
