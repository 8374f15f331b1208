"""What only a GPU can show, in one call of at most nine minutes.

    python -m moesvd_quant.evaluation.benchmarks.gpu

(make bench-gpu). Three parts, the results of each written when it is done: Triton's kernels against dense products in
float64; speed at the layer shapes of Mixtral-8x7B and Qwen3-30B-A3B, random weights, beside the original in 16 bit and
what the GPU's memory and arithmetic would allow; seconds to compress experts of Mixtral's shape. A part that the time
does not reach is named. On a CPU (`--device cpu --small`) it is a rehearsal, whose figures mean nothing.
"""

import os
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoConfig

from moesvd_quant.evaluation.benchmarks.compress import RECIPES, compress, expert_weights, prepared, whole
from moesvd_quant.evaluation.benchmarks.layouts import layouts, trellis
from moesvd_quant.evaluation.random_model import open_model, uniform_layout
from moesvd_quant.evaluation.speed import measure
from moesvd_quant.evaluation.table import Table, render
from moesvd_quant.memory.files import write_json
from moesvd_quant.model.named import resolve_device
from moesvd_quant.runtime.formats import Format
from moesvd_quant.runtime.grids import Grid

SHAPES: dict[str, dict[str, Any]] = {
    "Mixtral-8x7B": dict(
        model_type="mixtral", hidden_size=4096, intermediate_size=14336, num_local_experts=8, num_experts_per_tok=2,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128,
    ),
    "Qwen3-30B-A3B": dict(
        model_type="qwen3_moe", hidden_size=2048, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128,
    ),
}  # fmt: skip
SMALL = dict(
    hidden_size=128, intermediate_size=256, moe_intermediate_size=128, num_experts=8, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32,
)  # fmt: skip
RATIOS = (0.2, 0.6)  # of the parameters, gone from factors in 16 bit
DECODE, PREFILL = 2.0, 0.8  # aims for `fit` at 2.3 bits, of the original's speed
NINE_MINUTES = 530.0
EQUAL = 2e-2  # of the largest output: products of inputs in bfloat16


def formats() -> dict[str, Format]:
    """All packed formats with a kernel."""
    found: dict[str, Format] = {f"grid, {bits} bits": Grid(bits, 128, False) for bits in (2, 3, 4, 8)}
    return found | {f"trellis, {rate} bits": trellis(rate) for rate in (1.0, 1.5, 2.0, 2.5, 3.0, 4.0)}


@torch.no_grad()
def kernel_errors(device: torch.device, out: int, columns: int) -> Table:
    """The largest error of each format's products, (tokens, columns) with three banks (out, columns), beside dense
    ones in float64, of the largest output."""
    rows: list[list[str | float]] = []
    for name, form in formats().items():
        generator, stored = torch.Generator(device).manual_seed(0), {}
        for kind, (size, dtype) in form.tensors((3, out, columns), torch.bfloat16).items():
            stored[kind] = torch.empty(size, dtype=dtype, device=device)
            form.random(kind, stored[kind], generator)
        dense = form.dequantize(stored, (out, columns), torch.float32).double()
        for sizes in ([1, 0, 1], [16, 3, 33]):
            x = torch.randn(sum(sizes), columns, generator=generator, device=device).bfloat16()
            found = form.products(stored, (out, columns), x, sizes).double()
            meant = torch.cat([own.double() @ dense[e].T for e, own in enumerate(x.split(sizes))])
            error = float((found - meant).abs().max() / meant.abs().max())
            rows.append([name, str(sizes), error, "equal" if error <= EQUAL else "**wrong**"])
    return Table("Kernels against dense products in float64", ["format", "tokens by expert", "error", ""], rows)


def speeds(device: torch.device, shape: str, small: bool, batches: list[int], prompt: int, repeats: int) -> dict:
    """`measure` of the original of one layer, factors in 16 bit, and all packed layouts."""
    described = dict(SHAPES[shape], num_hidden_layers=1, vocab_size=4096, dtype="bfloat16")
    with tempfile.TemporaryDirectory() as scratch:
        AutoConfig.for_model(**(described | SMALL if small else described)).save_pretrained(scratch)
        wanted = {f"factors, {ratio:.0%} fewer": uniform_layout(scratch, ratio) for ratio in RATIOS} | layouts(scratch)
        models = {"original": open_model(scratch, str(device))}
        models |= {name: open_model(scratch, str(device), layout) for name, layout in wanted.items()}
    return measure(models, batches, [prompt], 4 if small else 16, repeats)


def speed_table(shape: str, found: dict) -> Table:
    """A row for each model: ratio to the original and share of the roofline, by batch; and of the prompt."""
    cells, machine = found["cells"], found["machine"]
    batches = sorted({cell["batch"] for cell in cells})
    head = ["model"]
    for batch in batches:
        head += [f"decode, batch {batch}", "experts", "of the roofline"]
    rows: list[list[str | float]] = []
    for name in dict.fromkeys(cell["model"] for cell in cells):
        own = {cell["batch"]: cell for cell in cells if cell["model"] == name}
        row: list[str | float] = [name]
        for batch in batches:
            decode = own[batch]["decode"]
            share = decode["tokens_per_second"] / decode["roofline"]
            row += [round(decode["speedup"], 2), round(decode["experts_speedup"], 2), f"{share:.0%}"]
        rows.append([*row, round(own[batches[0]]["prefill"]["speedup"], 2)])
    title = f"{shape}, one layer: {machine['device']}, {machine['flops'] / 1e12:.1f} TFLOP/s, "
    title += f"{machine['bandwidth'] / 1e9:.0f} GB/s. Aim of fit2.3: decode {DECODE}, prefill {PREFILL}"
    return Table(title, [*head, "prefill"], rows)


def compression(device: torch.device, small: bool, recipe: str, out: Path) -> dict[str, float]:
    """Seconds per million weights that a recipe takes for one layer of two experts of Mixtral's shape."""
    from moesvd_quant.evaluation.benchmarks.synthetic import synthetic

    size = dict(hidden_size=64, intermediate_size=96) if small else dict(hidden_size=4096, intermediate_size=14336)
    model = out / "model"
    if not model.exists():
        synthetic(model, "mixtral", 1, torch.bfloat16, **size, num_local_experts=2, vocab_size=4096)
    os.environ["MOESVD_CACHE"] = str(out / f"cache-{recipe}")
    clock = compress(prepared(model, recipe, out / recipe, 4 if small else 64, 64 if small else 1024, str(device)))
    millions = expert_weights(model) / 1e6
    spent = {phase: seconds.wall / millions for phase, seconds in clock.spent.items() if seconds.wall}
    together = whole(clock.spent).wall / millions
    return {"whole": together} | dict(sorted(spent.items(), key=lambda item: -item[1])[:3])


def main(
    device: Annotated[str, typer.Option(help="auto: a GPU where there is one.")] = "auto",
    small: Annotated[bool, typer.Option("--small", help="A rehearsal in tiny shapes.")] = False,
    seconds: Annotated[float, typer.Option(help="No part begins later than this.")] = NINE_MINUTES,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("gpu-out"),
) -> None:
    """Measures what a GPU can do with packed models. Exit code 1 where a kernel is wrong or a part was not reached."""
    started, where = time.monotonic(), resolve_device(device)
    out.mkdir(parents=True, exist_ok=True)
    tables, left = [], []

    def show(table: Table) -> None:
        tables.append(render(table, "markdown"))
        print(f"{table.title}\n\n{tables[-1]}", flush=True)
        (out / "gpu.md").write_text("\n".join(tables))

    errors = kernel_errors(where, *((48, 128) if small else (4096, 1024)))
    show(errors)
    for shape in SHAPES:
        if time.monotonic() - started > 0.6 * seconds:
            left.append(f"speed of {shape}")
            continue
        found = speeds(where, shape, small, [1] if small else [1, 4, 16], 16 if small else 256, 1 if small else 5)
        write_json(out / f"speed-{shape}.json", found)
        show(speed_table(shape, found))
    rows: list[list[str | float]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for recipe in RECIPES:
            if time.monotonic() - started > 0.8 * seconds:
                left.append(f"compression by {recipe}")
                continue
            took = compression(where, small, recipe, Path(scratch))
            largest = ", ".join(f"{phase} {value:.3f}" for phase, value in list(took.items())[1:])
            rows.append([recipe, round(took["whole"], 3), largest])
    show(Table("Seconds per million weights", ["recipe", "whole", "largest parts"], rows))
    print(f"{time.monotonic() - started:.0f} s; not reached: {', '.join(left) or 'nothing'}")
    raise typer.Exit(1 if left or any(row[-1] != "equal" for row in errors.rows) else 0)


if __name__ == "__main__":
    typer.run(main)
