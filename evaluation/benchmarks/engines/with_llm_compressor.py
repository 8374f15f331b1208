"""llm-compressor's REAP, alone or with its GPTQ after it. SETTING: the share of experts left out; with +4 in 4 bits."""

from pathlib import Path

import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from datasets import Dataset
from exchange import calibration, main, safetensors_sizes, texts, write_sizes
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning.reap import REAPPruningModifier
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

GROUP = 64  # divides rows of 192 as well


def make(model: Path, windows: Path, setting: str, out: Path) -> None:
    share, _, bits = setting.partition("+")
    loaded = AutoModelForCausalLM.from_pretrained(model)
    rows = calibration(windows).tolist()
    recipe: list = [REAPPruningModifier(sparsity=float(share))] if float(share) else []
    if bits:
        weights = {"num_bits": int(bits), "type": "int", "symmetric": False, "strategy": "group", "group_size": GROUP}
        groups = {"all": {"targets": ["Linear"], "weights": weights}}
        recipe.append(GPTQModifier(config_groups=groups, ignore=["lm_head", "re:.*mlp.gate$"], actorder="static"))
    oneshot(
        model=loaded,
        tokenizer=AutoTokenizer.from_pretrained(model),
        dataset=Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}),
        recipe=recipe,
        max_seq_length=len(rows[0]),
        num_calibration_samples=len(rows),
        shuffle_calibration_samples=False,
        output_dir=str(out),
    )
    write_sizes(safetensors_sizes(out), out)


@torch.no_grad()
def logits(windows: Path, out: Path):
    """transformers does not find the experts in llm-compressor's files, and starts with random ones, with a warning.
    So they are put where it looks for them, in float32."""
    config = AutoConfig.from_pretrained(out)
    bits = getattr(config, "quantization_config", None)
    config.quantization_config = None
    stored = {n: t for file in sorted(out.glob("*.safetensors")) for n, t in load_file(file).items()}
    loaded = AutoModelForCausalLM.from_config(config).float().eval()
    for name, parameter in loaded.named_parameters():
        own = name.replace(".mlp.", ".block_sparse_moe.")
        if ".experts." not in name:
            parameter.copy_(weight(stored, own.removesuffix(".weight"), bits))
            continue
        parts = ("gate_proj", "up_proj") if name.endswith("gate_up_proj") else ("down_proj",)
        prefix = own.rpartition(".")[0]
        for expert in range(len(parameter)):
            whole = [weight(stored, f"{prefix}.{expert}.{part}", bits) for part in parts]
            parameter[expert] = torch.cat(whole)
    for row in torch.from_numpy(texts(windows)):
        yield loaded(input_ids=row[None], use_cache=False).logits[0].numpy()


def weight(stored: dict[str, torch.Tensor], name: str, about) -> torch.Tensor:
    """Float32 weight of a linear, out of what compressed-tensors packed where it did."""
    if f"{name}.weight" in stored:
        return stored[f"{name}.weight"].float()
    bits = next(iter(about["config_groups"].values()))["weights"]["num_bits"]
    shape = torch.Size(stored[f"{name}.weight_shape"].tolist())
    scale = stored[f"{name}.weight_scale"].float()
    zeros = unpack_from_int32(stored[f"{name}.weight_zero_point"], bits, scale.shape, packed_dim=0)
    codes = unpack_from_int32(stored[f"{name}.weight_packed"], bits, shape)
    grouped = codes.float().unflatten(1, (scale.shape[1], -1)) - zeros.float()[..., None]
    return (grouped * scale[..., None]).flatten(1)


if __name__ == "__main__":
    main(make, logits)
