"""bitsandbytes' NF4 of every expert and linear, computed with in float32. It leaves fused experts alone, so that they
are given to it matrix by matrix here. SETTING: nf4 or fp4."""

from pathlib import Path

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from exchange import main, safetensors_sizes, texts, write_sizes
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM


def make(model: Path, windows: Path, setting: str, out: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(model)
    out.mkdir(parents=True)
    loaded.config.save_pretrained(out)
    tied = {"lm_head.weight"} if loaded.config.tie_word_embeddings else set()
    stored = {}
    for name, tensor in loaded.state_dict().items():
        if ".experts." in name or "_proj." in name:
            codes, state = quantize_4bit(tensor.contiguous(), quant_type=setting)
            stored |= {name: codes, f"{name}.absmax": state.absmax}
        elif name not in tied:
            stored[name] = tensor
    save_file(stored, out / "model.safetensors", {"quant_type": setting})
    write_sizes(safetensors_sizes(out), out)


@torch.no_grad()
def logits(windows: Path, out: Path):
    from bitsandbytes.functional import QuantState, get_4bit_type
    from safetensors import safe_open

    with safe_open(out / "model.safetensors", "pt") as file:
        kind = file.metadata()["quant_type"]
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    loaded = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(out)).float().eval()
    code = get_4bit_type(kind, device="cpu")
    for name, parameter in loaded.named_parameters():
        if f"{name}.absmax" not in stored:
            parameter.copy_(stored[name].float())
            continue
        absmax = stored[f"{name}.absmax"]
        state = QuantState(absmax, parameter.shape, code, parameter.numel() // absmax.numel(), kind, torch.float32)
        parameter.copy_(dequantize_4bit(stored[name], state))
    for row in torch.from_numpy(texts(windows)):
        yield loaded(input_ids=row[None], use_cache=False).logits[0].numpy()


if __name__ == "__main__":
    main(make, logits)
