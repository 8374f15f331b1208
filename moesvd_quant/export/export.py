"""Checkpoints for other software: plain 16-bit weights, or the standard GPTQ format. One layer at a time."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from ..checkpoint.accounting import original_model, stored_tensors
from ..checkpoint.finish import OUTER_FILE, layer_file, write_index
from ..checkpoint.layout import layout_of
from ..checkpoint.unused import UNUSED_FILE, write_unused
from ..checkpoint.verify import check_carried
from ..memory.files import write_json, write_one_by_one
from ..model.carried import carry_files
from ..model.experts import is_shared, split_projections
from ..model.folder import ModelError
from ..model.hf_internals import revert_weight_conversion, tied_weights
from ..model.stream import StreamedModel
from ..quantize.codec import PackedMatrix, QuantizeError
from ..runtime.factorized_experts import FactorizedExperts
from ..runtime.grids import Grid
from ..runtime.native_experts import form_of
from ..runtime.packing import pack, unpack
from ..runtime.parts import JOINT, channel_tensors
from ..runtime.stored import Stored, StoredLinear
from .gptq_format import to_standard


def export_checkpoint(folder: Path, out: Path, to: str) -> None:
    """Writes `folder` (one of ours) into `out` as "dense" or "gptq". ModelError where that cannot be."""
    if to not in ("dense", "gptq"):
        raise ModelError(f"--to {to}: is neither dense nor gptq")
    if out.exists() and any(out.iterdir()):
        raise ModelError(f"{out}: exists and is not empty; choose another --out")
    parent = StreamedModel(folder)
    if not hasattr(parent.config, "moesvd"):
        raise ModelError(f"{folder}: is not one of our checkpoints; there is nothing to export")
    if to == "dense":
        _require_dense_form(parent.model)
    out.mkdir(parents=True, exist_ok=True)
    native = original_model(parent, _experts_left(parent))
    quants: dict[str, dict] = {}
    names: dict[str, str] = {}
    total = 0
    for file, prefix in _parts(parent):
        modules = {path: m for path, m in parent.model.named_modules() if _belongs(path + ".", prefix, parent)}
        state = {key: tensor for key, tensor in _native_state(parent.model).items() if _belongs(key, prefix, parent)}
        if to == "dense":
            tensors = _dense(modules, state, native, parent, prefix)
        else:
            tensors = state | _standard(modules, quants)
        write_one_by_one(out / file, tensors)
        names |= dict.fromkeys(tensors, file)
        total += sum(t.numel() * t.element_size() for t in tensors.values())
    write_unused(parent, out)
    names |= dict.fromkeys(parent.unused(), UNUSED_FILE)
    total += sum(tensor.bytes for tensor in parent.unused().values())
    write_index(out, names, total)
    native.config.architectures = [type(native).__name__]
    native.config.save_pretrained(out)
    if to == "gptq":
        quantization = _quantization(quants)
        write_json(out / "config.json", native.config.to_dict() | {"quantization_config": quantization})
        write_json(out / "quantize_config.json", quantization)
    carry_files(folder, out)
    if to == "dense":
        check_carried(StreamedModel(out), folder, layout_of(parent))


def _experts_left(parent: StreamedModel) -> int | None:
    """How many routed experts each layer has, where some were dropped or merged; None where all are there. ModelError
    where layers have different numbers: no class of transformers can hold them."""
    found = [m for _, m in parent.model.named_modules() if isinstance(m, FactorizedExperts) and not is_shared(m)]
    if all(module.sources is None for module in found):
        return None
    counts = sorted({module.experts for module in found})
    if len(counts) > 1:
        raise ModelError(
            f"{parent.folder}: layers have {', '.join(map(str, counts))} experts, and plain checkpoints have the same "
            "number in each; load it with moesvd_quant, or keep as many experts in each layer"
        )
    return counts[0]


def _parts(parent: StreamedModel) -> Iterator[tuple[str, str | None]]:
    """(file to write, prefix of a layer or None for all else); each is in memory until the next is asked for."""
    for index, name in enumerate(parent.layer_names):
        parent.load_layer(index)
        yield layer_file(index), name + "."
        parent.drop_layer(index)
    parent.load_outer()
    yield OUTER_FILE, None


def _belongs(key: str, prefix: str | None, parent: StreamedModel) -> bool:
    return key.startswith(prefix) if prefix else not key.startswith(tuple(n + "." for n in parent.layer_names))


def _native_state(model) -> dict[str, torch.Tensor]:
    """The state without the banks of our modules."""
    ours = set()
    for path, module in model.named_modules():
        if isinstance(module, Stored):
            ours |= {f"{path}.{key}" for key in module.stored_tensors()}
        if isinstance(module, FactorizedExperts):
            ours |= {f"{path}.{key}" for key in channel_tensors(module.layout)}
    tied = tied_weights(model)
    return {k: v for k, v in model.state_dict().items() if k not in ours and k not in tied}


def _dense(modules: dict, state: dict, native, parent: StreamedModel, prefix: str | None) -> dict[str, torch.Tensor]:
    """Tensors of a part of the native model, under the names and in the form that its checkpoints have."""
    dtype = parent.stored_dtype
    for path, module in modules.items():
        if isinstance(module, StoredLinear):
            state[f"{path}.weight"] = module.dense_weight().to(dtype)
        if isinstance(module, FactorizedExperts):
            fused = _fused(module, native.get_submodule(path), dtype)
            state |= {f"{path}.{name}": tensor for name, tensor in fused.items()}
    wanted = {key for key in stored_tensors(native) if _belongs(key, prefix, parent)}
    if lost := sorted(wanted ^ set(state)):
        raise ModelError(f"{parent.folder}: tensors do not fit the native model: {lost[:5]}")
    return revert_weight_conversion(native, state)


def _require_dense_form(model) -> None:
    for path, module in model.named_modules():
        if "channel_prior" in module._parameters:
            raise ModelError(
                f"{path}: each token chooses channels of the base (d2.dynamic): no dense weight does the same"
            )


def _fused(module: FactorizedExperts, native, dtype) -> dict[str, torch.Tensor]:
    """The weight parameters of the native experts module, by their names, as its class lays them out."""
    names = form_of(native).parameters(native)
    for name in names:
        _put(native, name, torch.zeros(native.get_parameter(name).shape, dtype=dtype))
    views = split_projections(native)
    with torch.no_grad():
        for name, view in views.items():
            for expert in range(module.experts):
                view[expert].copy_(module.dense(name, expert))
    made = {name: native.get_parameter(name).data for name in names}
    for name, tensor in made.items():
        _put(native, name, tensor.to("meta"))
    return made


def _put(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module.get_submodule(path)._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def _packed_modules(modules: dict):
    """(standard path, packed matrix, bias) of every quantized matrix; ModelError where one is factorized."""
    for path, module in modules.items():
        if isinstance(module, StoredLinear):
            if module.rank:
                raise ModelError(f"{path}: has a low-rank term beside its packed weight; export it --to dense")
            packed = PackedMatrix(module.bank_tensors("weight"), module.layout.form, module.bank_shapes["weight"])
            yield path, packed, module.bias
        if isinstance(module, FactorizedExperts):
            if module.flags.has_bias:
                raise ModelError(f"{path}: experts with biases have no standard GPTQ form")
            for name, parts in module.layout.items():
                for i, part in enumerate(parts):
                    form = part.form("dense")
                    if not form.packed:
                        raise ModelError(f"{path}.{name}: is factorized or not quantized; export it --to dense")
                    shape = module.bank_shapes[f"{name}_{i}_dense"]
                    for expert, row in zip(part.experts, part.users("dense")):
                        tensors = module.bank_tensors(f"{name}_{i}_dense", row)
                        home = path if is_shared(module) else f"{path}.{expert}"
                        for own, half in _halves(name, PackedMatrix(tensors, form, shape)):
                            yield f"{home}.{own}_proj", half, None


def _halves(name: str, packed: PackedMatrix) -> Iterator[tuple[str, PackedMatrix]]:
    """(projection of the native model, its rows) of a packed matrix."""
    if name != JOINT:
        yield name, packed
        return
    tensors, form = packed.tensors, packed.form
    if not isinstance(form, Grid):
        raise ModelError(f"{name}: the GPTQ format holds grids, this matrix is in format {form.name}")
    apart = {kind: tensors[kind].chunk(2) for kind in ("codes", "scales")} | {"base": (tensors["base"],) * 2}
    if "zeros" in tensors:
        values = unpack(tensors["zeros"], form.bits, tensors["scales"].numel())
        apart["zeros"] = tuple(pack(half, form.bits) for half in values.chunk(2))
    for at, own in enumerate(("gate", "up")):
        half = packed.shape[0] // 2, packed.shape[1]
        yield own, PackedMatrix({kind: halves[at] for kind, halves in apart.items()}, form, half)


def _standard(modules: dict, quants: dict[str, dict]) -> dict[str, torch.Tensor]:
    """Tensors of the quantized matrices in the GPTQ format; what each is quantized with is added to `quants`."""
    tensors: dict[str, torch.Tensor] = {}
    for path, packed, bias in _packed_modules(modules):
        try:
            made = to_standard(packed, bias)
        except QuantizeError as error:
            raise ModelError(f"{path}: {error}") from error
        tensors |= {f"{path}.{name}": tensor for name, tensor in made.items()}
        quants[path] = asdict(packed.form)
    return tensors


def _quantization(quants: dict[str, dict]) -> dict:
    """The `quantization_config` of a GPTQ checkpoint."""
    size = Counter(q["group_size"] for q in quants.values()).most_common(1)[0][0]
    first = next(iter(quants.values()))
    other = {p: q["group_size"] for p, q in quants.items() if q["group_size"] != size}
    return {
        "bits": first["bits"],
        "group_size": size,
        "sym": first["sym"],
        "desc_act": False,
        "lm_head": "lm_head" in quants,
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "dynamic": {f"+:^{re.escape(path)}$": {"group_size": s} for path, s in other.items()},
    }
