"""Tokens per second of packed models beside their original, on random weights: a packed result is as fast as its bytes.

    python -m moesvd_quant.evaluation.benchmarks.speed

(make bench-speed; minutes, on a machine whose cores nothing else uses).

Two shapes: eight experts of which a token takes two (as Mixtral's), and 64 small ones of which it takes eight (as
Qwen3's), two layers each. In every round all models take turns. Prints ratios to the original (medians over the
rounds), of the whole and of the experts alone, and the part of what the machine's memory and arithmetic would allow, in
Markdown; exit code 1 where a ratio is below its bar.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

SHAPES = {
    "coarse": dict(model_type="mixtral", intermediate_size=3584, num_local_experts=8, num_experts_per_tok=2),
    "fine": dict(model_type="qwen3_moe", moe_intermediate_size=512, num_experts=64, num_experts_per_tok=8),
}
COMMON = dict(hidden_size=1024, num_hidden_layers=2, num_attention_heads=16, num_key_value_heads=4, vocab_size=4096)
BARS = {"gptq4": 1.5, "gptq2": 1.3, "fit2.3": 1.3, "trellis2": 1.0}  # decode
PREFILL = 0.8
PROMPT = 256


def write_config(folder: Path, shape: str) -> Path:
    """A folder with the config of a shape, and no weights."""
    from transformers import AutoConfig

    folder.mkdir(parents=True)
    described = dict(COMMON, **SHAPES[shape], head_dim=64, dtype="bfloat16")
    AutoConfig.for_model(**described).save_pretrained(folder)
    return folder


def rows_of(shape: str, cells: list[dict]) -> tuple[list[list[str]], bool]:
    """A row for each model, and whether all bars are met."""
    rows, met = [], True
    for name in dict.fromkeys(cell["model"] for cell in cells):
        own = {cell["batch"]: cell for cell in cells if cell["model"] == name}
        row = [shape, name]
        for cell in own.values():
            decode, experts = cell["decode"], cell["decode"]["experts_speedup"]
            share = decode["tokens_per_second"] / decode["roofline"]
            row += [f"{decode['tokens_per_second']:.0f}", f"{decode['speedup']:.2f}", f"{experts:.2f}", f"{share:.0%}"]
            met &= decode["speedup"] >= BARS.get(name, 0)
        prefill = own[min(own)]["prefill"]["speedup"]
        rows.append([*row, f"{prefill:.2f}"])
        met &= name not in BARS or prefill >= PREFILL
    return rows, met


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--only", nargs="+", choices=list(BARS), default=list(BARS))
    given = parser.parse_args()

    from moesvd_quant.evaluation.benchmarks.layouts import layouts
    from moesvd_quant.evaluation.random_model import open_model
    from moesvd_quant.evaluation.speed import measure

    rows: list[list[str]] = []
    met = True
    for shape in given.shapes:
        with tempfile.TemporaryDirectory() as scratch:
            folder = write_config(Path(scratch) / shape, shape)
            models = {"original": open_model(folder)}
            chosen = {name: layout for name, layout in layouts(folder).items() if name in given.only}
            models |= {name: open_model(folder, layout=layout) for name, layout in chosen.items()}
            found = measure(models, given.batches, [PROMPT], given.tokens, given.repeats)
        own, fine = rows_of(shape, found["cells"])
        rows, met = rows + own, met and fine
        machine = found["machine"]
    head = ["shape", "model"]
    for batch in given.batches:
        head += [f"batch {batch}: tokens/s", "ratio", "experts' ratio", "of the roofline"]
    for line in [[*head, f"prefill of {PROMPT}: ratio"], ["-"] * (len(head) + 1), *rows]:
        print("| " + " | ".join(line) + " |")
    peak, band = machine["flops"] / 1e9, machine["bandwidth"] / 1e9
    policy = os.environ.get("OMP_WAIT_POLICY", "unset")
    print(f"\n{machine['device']}: {peak:.0f} GFLOP/s, {band:.1f} GB/s; OMP_WAIT_POLICY {policy}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
