"""What published models will need, from their shapes alone: bytes and memory as `moesvd plan` has them.

    python -m moesvd_quant.evaluation.benchmarks.hardware [--folder FOLDER]

(make bench-hardware). The models are hollow: their weight files have true headers and no data (sparse files), so that
plans can be made without a download. Prints a table in Markdown. Times are forecasts for the machine that it runs on:
work counted on shapes, by rates that are measured first (`run/seconds.py`).
"""

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

import moesvd_quant  # noqa: F401 (registers the stages)
from moesvd_quant.calibration.store import Statistics
from moesvd_quant.checkpoint.accounting import account, by_file
from moesvd_quant.checkpoint.finish import write_index
from moesvd_quant.memory.limits import Memory
from moesvd_quant.model.opened import empty_model
from moesvd_quant.model.stream import StreamedModel
from moesvd_quant.planning.context import Context
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.run.forecast import forecast
from moesvd_quant.run.seconds import Rates, Seconds, forecast_seconds, measured_rates

CONFIGS: dict[str, tuple[str, dict]] = {
    "Mixtral-8x7B": ("MixtralConfig", dict(num_key_value_heads=8, max_position_embeddings=32768)),
    "Qwen3-30B-A3B": (
        "Qwen3MoeConfig",
        dict(
            vocab_size=151936, num_hidden_layers=48, num_key_value_heads=4, head_dim=128, mlp_only_layers=[],
            tie_word_embeddings=False, max_position_embeddings=40960,
        ),
    ),
    "DeepSeek-V2-Lite": (
        "DeepseekV2Config",
        dict(
            vocab_size=102400, hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408,
            num_hidden_layers=27, num_attention_heads=16, num_key_value_heads=16, n_routed_experts=64,
            n_shared_experts=2, num_experts_per_tok=6, first_k_dense_replace=1, kv_lora_rank=512, q_lora_rank=None,
            qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, topk_method="greedy", n_group=1, topk_group=1,
            max_position_embeddings=163840,
        ),
    ),
}  # fmt: skip
WINDOWS, LENGTH, WRITTEN = 256, 2048, 128  # of calibration: the recipes' defaults
BUDGET = 2.3
UNLIMITED = 10**13


@dataclass(frozen=True)
class Row:
    """Bytes, parameters and operations of a model."""

    model: str
    original: int
    gptq4: int
    fit: int  # at BUDGET bits per expert weight
    memory: int  # at the peak of `fit`, everything in memory
    least: int  # with on disk what can be
    cache: int  # statistics, and hidden states of a walk that does not keep them in memory
    weights: int  # of routed experts
    gptq4_time: Seconds
    fit_time: Seconds

    def cells(self) -> list[str]:
        sizes = (self.original, self.gptq4, self.fit, self.memory, self.least, self.cache)
        times = [f"{one.text / 3600:.0f} + {one.weights / 3600:.0f}" for one in (self.gptq4_time, self.fit_time)]
        return [self.model, *(f"{size / 1e9:.1f}" for size in sizes), f"{self.weights / 1e9:.1f}", *times]


def hollow(folder: Path, config) -> Path:
    """A model folder with the tensors of a config in bfloat16, whose files take no room."""
    folder.mkdir(parents=True)
    config.dtype = torch.bfloat16
    model = empty_model(config, torch.bfloat16)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    layers = [name for name, module in model.named_modules() if name.rpartition(".")[0].endswith("layers")]
    index: dict[str, str] = {}
    for part, tensors in by_file(model, layers).items():
        file = f"model-{part}.safetensors"
        _write_hollow(folder / file, tensors)
        index |= dict.fromkeys(tensors, file)
    write_index(folder, index, 0)
    return folder


def _write_hollow(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    header, offset = {}, 0
    for name, tensor in tensors.items():
        end = offset + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    content = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    with open(file, "wb") as written:
        written.write(len(content).to_bytes(8, "little") + content)
        written.truncate(8 + len(content) + offset)


def measure(name: str, folder: Path, rates: Rates) -> Row:
    """Of a hollow model. `fit` is the plan of `gptq4` with BUDGET bits in place of those of its experts, which is what
    a budget in bits per weight means."""
    model = StreamedModel(folder)
    gptq, fit = load_recipe("gptq4").stages[-1], load_recipe("fit")
    times = [
        forecast_seconds(model, stages, rates, (WINDOWS, LENGTH), WRITTEN, False, 0, 1)
        for stages in ([gptq], fit.stages)
    ]
    roomy = Memory(UNLIMITED)
    statistics = Statistics(
        folder,
        "hollow",
        lambda: None,
        cap_bytes=UNLIMITED,
        root=folder / "cache",
        memory=roomy,
        shape=(WINDOWS, LENGTH),
    )
    planned = account(model, gptq.plan(Context(model, statistics, gptq, 0, model.device)).layout)
    rest = planned.disk_bytes - planned.expert_bytes
    weights = planned.original_expert_params
    needs = forecast(model, statistics.sizes, WINDOWS * LENGTH, statistics, roomy, 1, fit.stages)
    return Row(
        name, planned.original_bytes, planned.disk_bytes, rest + round(BUDGET * weights / 8), needs.memory, needs.least,
        needs.statistics_disk + 2 * WINDOWS * LENGTH * statistics.sizes.row, weights, *times,
    )  # fmt: skip


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--folder", type=Path, help="for the hollow models; default: a temporary one")
    folder = asked.parse_args().folder
    columns = [
        "model", "original GB", "gptq4 GB", f"fit@{BUDGET}bpw GB", "memory GB", "least memory GB", "cache GB",
        "10^9 expert weights", "hours of gptq4: text + weights", "of fit",
    ]  # fmt: skip
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    rates = measured_rates(load_recipe("fit").stages, torch.device("cpu"))
    with tempfile.TemporaryDirectory(dir=folder) as made:
        for name, (kind, options) in CONFIGS.items():
            config = getattr(transformers, kind)(**options)
            print("| " + " | ".join(measure(name, hollow(Path(made) / name, config), rates).cells()) + " |", flush=True)


if __name__ == "__main__":
    main()
