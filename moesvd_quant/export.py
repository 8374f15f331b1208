"""Checkpoints for other software: plain 16-bit weights, or the standard GPTQ format."""

import re
from collections import Counter
from pathlib import Path

import torch

from .accounting import original_model
from .checkpoint.files import write_json, write_tensors
from .checkpoint.finish import carry_files
from .model.experts import split_projections
from .model.load import load
from .model.modeling_moesvd import FactorizedExperts, PackedLinear, part_banks
from .model.native_experts import form_of
from .model.stream import ModelError, StreamedModel
from .quantize.gptq import PackedMatrix, QuantizeError, to_standard


def export_checkpoint(folder: Path, out: Path, to: str) -> None:
    """Writes `folder` (one of ours) into `out` as "dense" or "gptq". ModelError where that cannot be."""
    if to not in ("dense", "gptq"):
        raise ModelError(f"--to {to}: is neither dense nor gptq")
    if out.exists() and any(out.iterdir()):
        raise ModelError(f"{out}: exists and is not empty; choose another --out")
    parent = StreamedModel(folder)
    if not hasattr(parent.config, "moesvd"):
        raise ModelError(f"{folder}: is not one of our checkpoints; there is nothing to export")
    model = load(folder)
    out.mkdir(parents=True, exist_ok=True)
    if to == "dense":
        _export_dense(model, parent, out)
    else:
        _export_gptq(model, parent, out)
    carry_files(folder, out)


def _native_state(model) -> dict[str, torch.Tensor]:
    """The state without the banks of our modules."""
    banks = set()
    for path, module in model.named_modules():
        if isinstance(module, PackedLinear):
            banks |= {f"{path}.weight"}
        if isinstance(module, FactorizedExperts):
            banks |= {f"{path}.{key}" for key, *_ in module.banks()}
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    kinds = ("_codes", "_scales", "_zeros")
    ours = banks | {bank + kind for bank in banks for kind in kinds}
    return {k: v for k, v in model.state_dict().items() if k not in ours and k not in tied}


def _export_dense(model, parent: StreamedModel, out: Path) -> None:
    dtype = parent.stored_dtype
    native, state = original_model(parent), _native_state(model)
    for path, module in model.named_modules():
        if isinstance(module, PackedLinear):
            state[f"{path}.weight"] = module.dense_weight().to(dtype)
        if isinstance(module, FactorizedExperts):
            fused = _fused(module, native.get_submodule(path), dtype)
            state |= {f"{path}.{name}": tensor for name, tensor in fused.items()}
    info = native.load_state_dict(state, strict=False, assign=True)
    tied = set(getattr(native, "all_tied_weights_keys", None) or {})
    if lost := [k for k in info.missing_keys if k not in tied] + info.unexpected_keys:
        raise ModelError(f"{out}: tensors do not fit the native model: {lost[:5]}")
    native.tie_weights()
    native.generation_config = model.generation_config
    native.save_pretrained(out)


def _fused(module: FactorizedExperts, native, dtype) -> dict[str, torch.Tensor]:
    """The weight parameters of the native experts module, by their names, as its class lays them out."""
    names = form_of(native).parameters(native)
    for name in names:
        owner, _, leaf = name.rpartition(".")
        empty = torch.zeros(native.get_parameter(name).shape, dtype=dtype)
        native.get_submodule(owner)._parameters[leaf] = torch.nn.Parameter(empty)
    views = split_projections(native)
    with torch.no_grad():
        for name in module.layout:
            for expert in range(module.experts):
                views[name][expert].copy_(module.dense(name, expert))
    return {name: native.get_parameter(name) for name in names}


def _packed_modules(model):
    """(standard path, packed matrix, bias) of every quantized matrix; ModelError where one is factorized."""
    for path, module in model.named_modules():
        if isinstance(module, PackedLinear):
            get = module._parameters.get
            tensors = {k: get(f"weight_{k}") for k in ("codes", "scales", "zeros") if get(f"weight_{k}") is not None}
            yield path, PackedMatrix(tensors, module.quant, module.in_features), module.bias
        if isinstance(module, FactorizedExperts):
            if module.has_bias:
                raise ModelError(f"{path}: experts with biases have no standard GPTQ form")
            for name, parts in module.layout.items():
                for i, part in enumerate(parts):
                    quant = part["quant"].get("dense")
                    if quant is None:
                        raise ModelError(f"{path}.{name}: is factorized or not quantized; export it --to dense")
                    columns = part_banks(part, *module.shapes[name])["dense"][-1]
                    for expert, row in zip(part["experts"], part["dense"]):
                        get = module._parameters.get
                        kinds = [k for k in ("codes", "scales", "zeros") if get(f"{name}_{i}_dense_{k}") is not None]
                        tensors = {k: get(f"{name}_{i}_dense_{k}")[row] for k in kinds}
                        yield f"{path}.{expert}.{name}_proj", PackedMatrix(tensors, quant, columns), None


def _export_gptq(model, parent: StreamedModel, out: Path) -> None:
    tensors, quants = _native_state(model), {}
    for path, packed, bias in _packed_modules(model):
        try:
            made = to_standard(packed, bias)
        except QuantizeError as error:
            raise ModelError(f"{path}: {error}") from error
        tensors |= {f"{path}.{name}": tensor for name, tensor in made.items()}
        quants[path] = packed.quant
    size = Counter(q["group_size"] for q in quants.values()).most_common(1)[0][0]
    first = next(iter(quants.values()))
    other = {p: q["group_size"] for p, q in quants.items() if q["group_size"] != size}
    quantization = {
        "bits": first["bits"],
        "group_size": size,
        "sym": first["sym"],
        "desc_act": False,
        "lm_head": "lm_head" in quants,
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "dynamic": {f"+:^{re.escape(path)}$": {"group_size": s} for path, s in other.items()},
    }
    config = original_model(parent).config.to_dict() | {"quantization_config": quantization}
    write_json(out / "config.json", config)
    write_json(out / "quantize_config.json", quantization)
    write_tensors(out / "model.safetensors", tensors)
