"""Finding experts, and the other linear layers, in any architecture of transformers 5."""

from collections.abc import Iterator

import torch
from torch import nn

from .modeling_moesvd import FactorizedExperts, PackedLinear, projection_shapes

# Names under which routers and the gate of a shared expert stand: they choose, and stay as they are.
ROUTERS = {"gate", "router", "shared_expert_gate"}


def is_fused(module: nn.Module) -> bool:
    """True for a module that follows transformers' `use_experts_implementation` convention."""
    own = module._parameters
    first = own.get("gate_up_proj") if own.get("gate_up_proj") is not None else own.get("up_proj")
    down = own.get("down_proj")
    if first is None or down is None or not hasattr(module, "is_transposed"):
        return False
    return first.dim() == 3 and down.dim() == 3


def find_experts(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path in the layer, module) of native fused experts and of ours."""
    for path, module in layer.named_modules():
        if is_fused(module) or isinstance(module, FactorizedExperts):
            yield path, module


def split_projections(native: nn.Module) -> dict[str, torch.Tensor]:
    """Weights (experts, out, in) of a native fused module, gate and up apart; views where possible."""
    transpose = (lambda w: w.transpose(1, 2)) if native.is_transposed else (lambda w: w)
    down = transpose(native.down_proj)
    if not native.has_gate:
        return {"up": transpose(native.up_proj), "down": down}
    joint = transpose(native.gate_up_proj)
    if native.is_concatenated:
        gate, up = joint.chunk(2, dim=1)
    else:
        gate, up = joint[:, ::2], joint[:, 1::2]
    return {"gate": gate, "up": up, "down": down}


def expert_count(experts: nn.Module) -> int:
    return experts.experts if isinstance(experts, FactorizedExperts) else experts.down_proj.shape[0]


def shapes_of(experts: nn.Module) -> dict[str, tuple[int, int]]:
    """(out, in) of each projection."""
    shapes = experts.shapes if isinstance(experts, FactorizedExperts) else projection_shapes(experts)
    return {name: (int(out), int(in_)) for name, (out, in_) in shapes.items()}


def dense_weight(experts: nn.Module, projection: str, expert: int, dtype=torch.float32) -> torch.Tensor:
    """Effective weight (out, in) of one projection of one expert, in `dtype`."""
    if isinstance(experts, FactorizedExperts):
        return experts.dense(projection, expert, dtype)
    return split_projections(experts)[projection][expert].to(dtype)


def dense_weights(experts: nn.Module, expert: int, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """Effective weight (out, in) of each projection of one expert, in `dtype`."""
    return {name: dense_weight(experts, name, expert, dtype) for name in shapes_of(experts)}


def activate(experts: nn.Module, pairs: dict[str, torch.Tensor], expert: int) -> torch.Tensor:
    """Input of down (n, intermediate) from the outputs of gate and up, biases added, by the native gate."""
    if experts.has_bias:
        ids = torch.full((len(pairs["up"]),), expert, device=pairs["up"].device)
        FactorizedExperts.add_bias(experts, pairs, ids)
    if isinstance(experts, FactorizedExperts):
        return experts.activate(pairs)
    if not experts.has_gate:
        return experts.act_fn(pairs["up"])
    both = pairs["gate"], pairs["up"]
    joint = torch.cat(both, -1) if experts.is_concatenated else torch.stack(both, -1).flatten(-2)
    return experts._apply_gate(joint)


def find_linears(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path in the layer, module) of attention, shared-expert and dense-layer linears; routers are left out."""
    inside = tuple(path + "." for path, _ in find_experts(layer))
    for path, module in layer.named_modules():
        if not isinstance(module, nn.Linear | PackedLinear) or path.startswith(inside):
            continue
        if not ROUTERS & set(path.split(".")):
            yield path, module
