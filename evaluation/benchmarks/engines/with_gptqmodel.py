"""GPTQModel's own high-level quantization and its own linears. SETTING: the number of bits."""

from pathlib import Path

import torch
from exchange import calibration, main, safetensors_sizes, texts, write_sizes
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

GROUP = 64  # divides rows of 192 as well


def make(model: Path, windows: Path, setting: str, out: Path) -> None:
    wanted = QuantizeConfig(bits=int(setting), group_size=GROUP, sym=False, desc_act=True, damp_percent=0.01)
    made = GPTQModel.load(str(model), wanted)
    rows = torch.from_numpy(calibration(windows))
    made.quantize(
        [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in rows], batch_size=8
    )
    made.save(str(out))
    write_sizes(safetensors_sizes(out), out)


@torch.no_grad()
def logits(windows: Path, out: Path):
    """In float32, which the CPU's linears of GPTQModel do not compute in: so with the weights they dequantize."""
    loaded = _dense(GPTQModel.load(str(out), device="cpu", dtype=torch.float16, backend=BACKEND.GPTQ_TORCH).model)
    for row in torch.from_numpy(texts(windows)):
        yield loaded(input_ids=row[None], use_cache=False).logits[0].numpy()


def _dense(model):
    packed = 0
    for name, module in list(model.named_modules()):
        if not hasattr(module, "dequantize_weight"):
            continue
        packed += 1
        weight = module.dequantize_weight().float()
        if weight.shape[0] == module.in_features:
            weight = weight.T
        linear = torch.nn.Linear(module.in_features, module.out_features, bias=False)
        linear.weight.data = weight.contiguous()
        model.set_submodule(name, linear)
    config = model.config
    wanted = config.num_hidden_layers * (4 + 3 * config.num_local_experts)
    if packed != wanted:
        raise SystemExit(f"GPTQModel packed {packed} linears; attention and experts have {wanted}")
    return model.float().eval()


if __name__ == "__main__":
    main(make, logits)
