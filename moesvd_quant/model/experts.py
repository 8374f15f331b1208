"""Finding experts, and the other linear layers, in any architecture of transformers 5."""

import copy
from collections.abc import Iterator

import torch
from torch import nn

from ..runtime.factorized_experts import FactorizedExperts
from ..runtime.native_call import Flags, Routed, add_bias, apply_gate, arguments
from ..runtime.native_experts import SharedExpert, form_of
from ..runtime.parts import JOINT, joined, separate
from ..runtime.routers import ROUTERS as ROUTERS
from ..runtime.stored import StoredLinear


def find_experts(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path in the layer, module) of native experts of any form and of ours."""
    inside: tuple[str, ...] = ()
    for path, module in layer.named_modules():
        if inside and path.startswith(inside):
            continue
        if isinstance(module, FactorizedExperts) or form_of(module) is not None:
            inside = (*inside, path + ".")
            yield path, module


def mark_shared_experts(layer: nn.Module) -> None:
    """From now on the MLPs beside the experts of a layer, which every token passes, are experts as well; those that do
    something of their own with their weights stay linears."""
    for _, module in shared_beside(layer):
        module.is_expert = True


def shared_beside(layer: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path in the layer, module) of the plain MLPs beside the experts, which every token passes."""
    homes = {path.rpartition(".")[0] for path, _ in find_experts(layer)}
    beside = [(path, m) for path, m in layer.named_modules() if path and path.rpartition(".")[0] in homes]
    return [(path, module) for path, module in beside if SharedExpert.fits(module) and _is_plain(module)]


def is_shared(experts: nn.Module) -> bool:
    """Whether every token passes this experts module."""
    return _form(experts) is SharedExpert


def _is_plain(module: nn.Module) -> bool:
    """Whether it computes down(act(gate(x)) * up(x)), or down(act(up(x))): tried with small weights, as large inputs
    as a clamp would show at."""
    tried = copy.deepcopy(module)
    for name, seed in (("gate", 0.3), ("up", 0.7), ("down", 1.1)):
        if f"{name}_proj" in tried._modules:
            made = nn.Linear(4, 4, bias=False, device="meta")
            weight = 20 * torch.sin(seed + torch.arange(16.0)).view(4, 4)
            made.weight = nn.Parameter(weight, requires_grad=False)
            setattr(tried, f"{name}_proj", made)
    x = torch.linspace(-2, 2, 12).view(3, 4)
    tried.is_expert = True
    with torch.no_grad():
        inner = intermediate(tried, 0, x)
        return torch.allclose(tried(x), inner @ dense_weight(tried, "down", 0).T, rtol=1e-4)


def _form(experts: nn.Module):
    return experts.form if isinstance(experts, FactorizedExperts) else form_of(experts)


def flags_of(experts: nn.Module) -> Flags:
    """What an experts module is like, native or ours."""
    return experts.flags if isinstance(experts, FactorizedExperts) else form_of(experts).flags(experts)


def split_projections(native: nn.Module) -> dict[str, torch.Tensor]:
    """Weights (experts, out, in) of a native experts module, gate and up apart; views into its parameters."""
    return _form(native).weights(native)


def sums_by_token(experts: nn.Module) -> bool:
    """Whether the module gives each token the sum of its experts' outputs times the router's weights, so that an
    expert's output is the same whatever the router says."""
    return hasattr(_form(experts), "combine")


def weight_parameters(native: nn.Module) -> list[nn.Parameter]:
    """The parameters of a native experts module that `split_projections` views."""
    return [native.get_parameter(name) for name in _form(native).parameters(native)]


def expert_count(experts: nn.Module) -> int:
    return experts.experts if isinstance(experts, FactorizedExperts) else len(split_projections(experts)["down"])


def shapes_of(experts: nn.Module) -> dict[str, tuple[int, int]]:
    """(out, in) of each projection."""
    if isinstance(experts, FactorizedExperts):
        shapes = experts.shapes
    else:
        shapes = {name: weight.shape[1:] for name, weight in split_projections(experts).items()}
    return {name: (int(out), int(in_)) for name, (out, in_) in shapes.items()}


def all_shapes(experts: nn.Module) -> dict[str, tuple[int, int]]:
    """(out, in) of each projection, and of gate and up together where there are both."""
    shapes = shapes_of(experts)
    return joined(shapes) | shapes


def dense_weight(experts: nn.Module, projection: str, expert: int, dtype=torch.float32) -> torch.Tensor:
    """Effective weight (out, in) of one projection (gate_up: of both) of one expert, in `dtype`."""
    if projection == JOINT and JOINT not in shapes_of(experts):
        return torch.cat([dense_weight(experts, name, expert, dtype) for name in ("gate", "up")])
    if isinstance(experts, FactorizedExperts):
        return experts.dense(projection, expert, dtype)
    return split_projections(experts)[projection][expert].to(dtype)


def dense_weights(experts: nn.Module, expert: int, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """Effective weight (out, in) of each projection of one expert, in `dtype`."""
    return {name: dense_weight(experts, name, expert, dtype) for name in shapes_of(experts)}


def route(experts: nn.Module, *inputs) -> Routed:
    """The pairs of a token and an expert that a call of the module means."""
    return _form(experts).route(experts, *inputs)


def gather(experts: nn.Module, y: torch.Tensor, routed: Routed, *inputs) -> torch.Tensor:
    """What the module returns, from the outputs (pairs, hidden) of its experts."""
    return _form(experts).gather(experts, y, routed, *inputs)


def activate(experts: nn.Module, pairs: dict[str, torch.Tensor], expert: int) -> torch.Tensor:
    """Input of down (n, intermediate) from the outputs of gate and up, biases added, by the native gate."""
    flags = flags_of(experts)
    add_bias(experts, flags, pairs, torch.full((len(pairs["up"]),), expert, device=pairs["up"].device))
    if isinstance(experts, FactorizedExperts):
        return experts.activate(pairs)
    if not flags.has_gate:
        return flags.act_fn(pairs["up"])
    both = pairs["gate"], pairs["up"]
    joint = torch.cat(both, -1) if flags.is_concatenated else torch.stack(both, -1).flatten(-2)
    return apply_gate(experts, type(experts), joint, flags.act_fn)


def intermediate(experts: nn.Module, expert: int, x: torch.Tensor) -> torch.Tensor:
    """Input of down (n, intermediate) of one expert for its inputs x (n, hidden)."""
    names = [name for name in shapes_of(experts) if name != "down"]
    pairs = {name: x @ dense_weight(experts, name, expert, x.dtype).T for name in names}
    return activate(experts, separate(pairs), expert)


def expert_output(experts: nn.Module, expert: int, inner: torch.Tensor) -> torch.Tensor:
    """Output (n, hidden) of one expert from the input of its down (n, intermediate)."""
    out, flags = inner @ dense_weight(experts, "down", expert, inner.dtype).T, flags_of(experts)
    if flags.has_bias:
        out = out + experts.down_proj_bias[expert]
    return experts.post_expert_norm(out) if flags.has_post_expert_norm else out


def pairs_of(expert: torch.Tensor, count: int) -> Iterator[tuple[int, slice]]:
    """(expert, its pairs) of those of `count` that have any, from the sorted experts of all pairs; identity experts
    after the last one are left out."""
    start = 0
    for index, size in enumerate(torch.bincount(expert, minlength=count).tolist()[:count]):
        if size:
            yield index, slice(start, start + size)
        start += size


def find_linears(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path in the layer, module) of all linears that are neither experts nor routers: attention, recurrent layers,
    shared experts, dense layers. A class of its own that multiplies in its own way is none."""
    inside = tuple(path + "." for path, _ in find_experts(layer))
    for path, module in layer.named_modules():
        plain = isinstance(module, StoredLinear) or type(module).forward is nn.Linear.forward
        if plain and not path.startswith(inside) and not ROUTERS & set(path.split(".")):
            yield path, module


def unknown_experts(layer: nn.Module) -> Iterator[tuple[str, str]]:
    """(path in the layer, why) of modules that seem to be experts and are in no form that is known."""
    inside = tuple(path + "." for path, _ in find_experts(layer))
    for path, module in layer.named_modules():
        name, own = type(module).__name__, module._parameters.values()
        if path.startswith(inside):
            continue
        if isinstance(module, nn.ModuleList) and len(module) > 1 and "expert" in path.rpartition(".")[2]:
            yield path, f"{len(module)} modules of class {type(module[0]).__name__} side by side, not fused"
        elif "expert" in name.lower() and (shapes := [tuple(p.shape) for p in own if p is not None and p.ndim > 2]):
            yield path, f"class {name} with weights {shapes}, called with ({', '.join(arguments(module))})"


def left_over(layer: nn.Module) -> Iterator[tuple[str, str]]:
    """(path in the layer, why) of every weight matrix that no stage touches."""
    taken = {id(p) for _, module in find_experts(layer) for p in module.parameters()}
    taken |= {id(p) for _, module in find_linears(layer) for p in module.parameters()}
    for path, parameter in layer.named_parameters():
        if parameter.ndim < 2 or id(parameter) in taken or min(parameter.shape) == 1:
            continue
        yield path, "router" if ROUTERS & set(path.split(".")) else "not a linear layer"
