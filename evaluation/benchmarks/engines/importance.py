"""llama.cpp's importance matrix of a Mixtral model: mean squares of what each matrix is multiplied with, for an expert
over the tokens that reach it. llama.cpp's own program for it is not in llama-cpp-python.

python importance.py MODEL WINDOWS OUT
"""

import sys
from pathlib import Path

import torch
from exchange import calibration
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

BATCH = 8


@torch.no_grad()
def importance(model, windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """{name of the tensor in GGUF: (columns), or (experts * columns), float32}."""
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, torch.Tensor] = {}

    def add(name: str, expert: int, experts: int, inputs: torch.Tensor) -> None:
        total = sums.setdefault(name, torch.zeros(experts, inputs.shape[-1]))
        total[expert] += inputs.square().sum(0)
        counts.setdefault(name, torch.zeros(experts, 1))[expert] += len(inputs)

    def linear(names: list[str]):
        def hook(module, given) -> None:
            for name in names:
                add(name, 0, 1, given[0].flatten(0, -2))

        return hook

    def routed(layer: int):
        def hook(module, given) -> None:
            hidden, chosen = given[0].flatten(0, -2), given[1]
            for expert in range(len(module.down_proj)):
                inputs = hidden[(chosen == expert).any(-1)]
                gate, up = (inputs @ module.gate_up_proj[expert].T).chunk(2, -1)
                for name, what in (("gate", inputs), ("up", inputs), ("down", module.act_fn(gate) * up)):
                    add(f"blk.{layer}.ffn_{name}_exps.weight", expert, len(module.down_proj), what)

        return hook

    for at, layer in enumerate(model.model.layers):
        shared = [f"blk.{at}.attn_{name}.weight" for name in "qkv"]
        layer.self_attn.q_proj.register_forward_pre_hook(linear(shared))
        layer.self_attn.o_proj.register_forward_pre_hook(linear([f"blk.{at}.attn_output.weight"]))
        layer.mlp.experts.register_forward_pre_hook(routed(at))
    model.lm_head.register_forward_pre_hook(linear(["token_embd.weight"]))
    for batch in windows.split(BATCH):
        model(input_ids=batch, use_cache=False)
    return {name: (total / counts[name].clamp(min=1)).flatten() for name, total in sums.items()}


if __name__ == "__main__":
    folder, given, out = sys.argv[1:]
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    save_file(importance(loaded, torch.from_numpy(calibration(Path(given)))), out)
