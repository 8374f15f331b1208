"""Memory of svd -> gptq4 on synthetic models of any depth, limited and not, and whether the files are the same.

    python tests/bench_scale.py --layers 32 --half 16 --room 1.0 --folder FOLDER      (make bench-scale)

For each architecture: a model of `layers` layers without a limit, the same with --memory at imports + `room` GB, and
one of `half` layers with that limit. Prints a table in Markdown; exit code 1 where a bar is missed.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def run_one(model: str, out: str, room: float, overrides: list[str]) -> None:
    """In a process of its own: prints {"imports", "forecast", "peak", "seconds"} in bytes above the imports."""
    import time

    import moesvd_quant  # noqa: F401
    from moesvd_quant.memory import PeakMeter, anonymous_bytes
    from moesvd_quant.quantize.gptq import _core
    from moesvd_quant.recipe import load_recipe
    from moesvd_quant.runner import Run, sync_threads

    sync_threads()
    _core()
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=3)
    parser.add_argument("--folder", type=Path, default=Path("bench-scale"))
    parser.add_argument("--architectures", nargs="+", default=["mixtral", "qwen3_moe"])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--half", type=int, default=16)
    parser.add_argument("--room", type=float, default=1.0, help="GB above the imports")
    parser.add_argument("--config", type=json.loads, default={}, help="JSON, for smaller models")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    overrides = given.overrides or ["calibration.dataset=demo", "calibration.samples=32", "calibration.length=512"]
    if given.one:
        run_one(given.one[0], given.one[1], float(given.one[2]), given.overrides)
        return 0
    from synthetic import synthetic

    overrides += ["evaluate.perplexity=[]"]
    rows, missed = [], []
    for architecture in given.architectures:
        found = {}
        for name, layers, room in (
            ("limited", given.layers, given.room),
            ("unlimited", given.layers, 0),
            ("half", given.half, given.room),
        ):
            folder = given.folder / f"{architecture}-{layers}"
            if not folder.exists():
                synthetic(folder, architecture, layers, **given.config)
            size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
            found[name] = row = measured(folder, given.folder, name, room, overrides)
            rows.append((architecture, layers, size, name, row))
            print(json.dumps([architecture, layers, size, name, row]), flush=True)
        if found["limited"]["digest"] != found["unlimited"]["digest"]:
            missed.append(f"{architecture}: the limit changed the result")
        if found["limited"]["peak"] > given.room * 1e9:
            missed.append(f"{architecture}: peak above {given.room} GB")
        if found["limited"]["peak"] > 1.05 * found["half"]["peak"]:
            missed.append(f"{architecture}: peak grows with depth")
    print("| model | layers | on disk GB | run | peak GB | forecast GB | minutes | files |")
    print("|---|---|---|---|---|---|---|---|")
    for architecture, layers, size, name, row in rows:
        figures = f"{row['peak'] / 1e9:.3f} | {row['forecast'] / 1e9:.3f} | {row['seconds'] / 60:.1f}"
        print(f"| {architecture} | {layers} | {size / 1e9:.2f} | {name} | {figures} | {row['digest'][:12]} |")
    print("\n".join(missed) or "all bars are met")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
