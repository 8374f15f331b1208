"""How long a packed checkpoint takes to open, beside reading its bytes and their digest once: `make bench-loading`.

Each time is of a process of its own; the file is in the system's cache in all of them.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from transformers import AutoConfig

from moesvd_quant.evaluation.benchmarks.layouts import layouts
from moesvd_quant.evaluation.benchmarks.speed import COMMON, SHAPES
from moesvd_quant.evaluation.speed import open_model
from moesvd_quant.model.hf_internals import no_loading_bars

LIMIT = 2.0
READ = """
import sys, time
from pathlib import Path
from moesvd_quant.runtime.modeling_moesvd import file_digest
start = time.perf_counter()
for file in Path(sys.argv[1]).glob("*.safetensors"):
    file_digest(file)
print(time.perf_counter() - start)
"""
OPEN = """
import sys, time
import moesvd_quant
import moesvd_quant.model.load
start = time.perf_counter()
moesvd_quant.load(sys.argv[1])
print(time.perf_counter() - start)
"""


def write_checkpoint(folder: Path, config: Path, layers: int, hidden: int) -> int:
    """Writes a packed Mixtral with random weights, and its config alone into another folder; bytes of its weights."""
    size = dict(num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=hidden // 64)
    described = COMMON | SHAPES["coarse"] | size
    AutoConfig.for_model(**described, head_dim=64, dtype="bfloat16").save_pretrained(config)
    with no_loading_bars():
        open_model(config, layout=layouts(config)["fit2.3"]).save_pretrained(folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def seconds(program: str, folder: Path) -> float:
    """What a program prints of a folder."""
    done = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main(
    layers: Annotated[int, typer.Option(help="Of the model; 20 make 1.1 GB.")] = 20,
    hidden: Annotated[int, typer.Option(help="Hidden size.")] = 2048,
    repeats: Annotated[int, typer.Option(help="Times that each is measured, in turn.")] = 5,
) -> None:
    """Exit code 1 where opening takes more than twice as long."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "packed"
        size = write_checkpoint(folder, Path(scratch) / "config", layers, hidden)
        times = [(seconds(READ, folder), seconds(OPEN, folder)) for _ in range(repeats)]
    read, opened = (median(column) for column in zip(*times))
    ratio = median(b / a for a, b in times)
    print(
        f"{size / 1e9:.2f} GB: read and verified in {read:.2f} s, opened in {opened:.2f} s, {ratio:.2f} times as long"
    )
    raise typer.Exit(0 if ratio <= LIMIT else 1)


if __name__ == "__main__":
    typer.run(main)
