"""How the architectures of transformers hold their experts, and how they call them. A copy lies in every checkpoint.

Most follow transformers' own convention; the few others have a form of their own here, told by their structure and not
by their name. A form says which tensors the weights are, and turns a call into pairs of a token and an expert.
"""

import torch
from torch import nn

from .native_call import Flags, Routed, activation_of, arguments


class Fused:
    """`use_experts_implementation`: experts(hidden (T, H), index (T, k), weights (T, k)); weights are gate_up_proj
    (E, 2I, H) and down_proj (E, H, I), or transposed, or without gate.
    """

    @staticmethod
    def matches(module: nn.Module) -> bool:
        return _holds_pair(module) and len(arguments(module)) == 3

    @staticmethod
    def flags(module: nn.Module) -> Flags:
        if not hasattr(module, "is_transposed"):
            return _plain_flags(module)
        return Flags(**{name: getattr(module, name) for name in Flags._fields if hasattr(module, name)})

    @staticmethod
    def parameters(module: nn.Module) -> list[str]:
        return ["gate_up_proj" if "gate_up_proj" in module._parameters else "up_proj", "down_proj"]

    @staticmethod
    def weights(module: nn.Module) -> dict[str, torch.Tensor]:
        flags = Fused.flags(module)
        turn = (lambda w: w.transpose(1, 2)) if flags.is_transposed else (lambda w: w)
        down = turn(module.down_proj)
        if not flags.has_gate:
            return {"up": turn(module.up_proj), "down": down}
        joint = turn(module.gate_up_proj)[: len(down)]  # LongCat-Flash has unused rows for its identity experts
        gate, up = joint.chunk(2, dim=1) if flags.is_concatenated else (joint[:, ::2], joint[:, 1::2])
        return {"gate": gate, "up": up, "down": down}

    @staticmethod
    def route(module: nn.Module, hidden, index, weights) -> Routed:
        expert, order = index.reshape(-1).sort(stable=True)
        x = hidden.reshape(-1, hidden.shape[-1])
        return Routed(x, order // index.shape[-1], expert, weights.reshape(-1)[order], order)

    @staticmethod
    def combine(y, routed: Routed) -> torch.Tensor:
        """(pairs, n) -> (tokens, n): the weighted sum over the experts of each token."""
        y = y * routed.scale.unsqueeze(-1)
        y = torch.empty_like(y).index_copy(0, routed.row, y)
        return y.view(len(routed.x), -1, y.shape[-1]).sum(1)

    @staticmethod
    def gather(module: nn.Module, y, routed: Routed, hidden, index, weights) -> torch.Tensor:
        return Fused.combine(y, routed).to(hidden.dtype).view(hidden.shape)


class Llama4:
    """Llama 4: experts(hidden (E * T, H)), every token scaled for every expert, zero where it was not routed."""

    @staticmethod
    def matches(module: nn.Module) -> bool:
        return _holds_pair(module) and len(arguments(module)) == 1

    @staticmethod
    def flags(module: nn.Module) -> Flags:
        return _plain_flags(module)

    parameters, weights = staticmethod(Fused.parameters), staticmethod(Fused.weights)

    @staticmethod
    def route(module: nn.Module, hidden) -> Routed:
        row = hidden.any(-1).nonzero()[:, 0]
        expert = row // (len(hidden) // _count(module))
        return Routed(hidden[row], torch.arange(len(row), device=row.device), expert, None, row)

    @staticmethod
    def gather(module: nn.Module, y, routed: Routed, hidden) -> torch.Tensor:
        return torch.zeros_like(hidden).index_copy(0, routed.row, y.to(hidden.dtype))


class Dbrx:
    """DBRX: the experts' matrices stand below each other in mlp.w1 (gate), v1 (up) and w2 (down, transposed)."""

    @staticmethod
    def matches(module: nn.Module) -> bool:
        own = module._modules.get("mlp")
        held = own is not None and all(getattr(own._parameters.get(n), "ndim", 0) == 2 for n in ("w1", "v1", "w2"))
        return held and hasattr(module, "num_experts") and len(arguments(module)) == 3

    @staticmethod
    def flags(module: nn.Module) -> Flags:
        return Flags(module.mlp.activation_fn)

    @staticmethod
    def parameters(module: nn.Module) -> list[str]:
        return ["mlp.w1", "mlp.v1", "mlp.w2"]

    @staticmethod
    def weights(module: nn.Module) -> dict[str, torch.Tensor]:
        held = module.mlp.w1, module.mlp.v1, module.mlp.w2
        gate, up, down = (w.view(module.num_experts, -1, w.shape[-1]) for w in held)
        return {"gate": gate, "up": up, "down": down.transpose(1, 2)}

    route, combine = staticmethod(Fused.route), staticmethod(Fused.combine)
    gather = staticmethod(Fused.gather)


class JetMoe:
    """JetMoE: the whole block, whose router gives pairs already sorted, and which adds one bias to its output."""

    @staticmethod
    def matches(module: nn.Module) -> bool:
        children = module._modules
        weights = [getattr(children.get(name), "weight", None) for name in ("input_linear", "output_linear")]
        return (
            all(getattr(weight, "ndim", 0) == 3 for weight in weights)
            and "router" in children
            and hasattr(module, "activation")
            and len(arguments(module)) == 1
        )

    @staticmethod
    def flags(module: nn.Module) -> Flags:
        return Flags(module.activation)

    @staticmethod
    def parameters(module: nn.Module) -> list[str]:
        return ["input_linear.weight", "output_linear.weight"]

    @staticmethod
    def weights(module: nn.Module) -> dict[str, torch.Tensor]:
        gate, up = module.input_linear.weight.chunk(2, dim=1)
        return {"gate": gate, "up": up, "down": module.output_linear.weight}

    @staticmethod
    def route(module: nn.Module, hidden) -> Routed:
        x = hidden.reshape(-1, hidden.shape[-1])
        _, token, scale, sizes, _ = module.router(x)
        expert = torch.repeat_interleave(torch.tensor(sizes, device=x.device))
        return Routed(x, token, expert, scale)

    @staticmethod
    def gather(module: nn.Module, y, routed: Routed, hidden) -> torch.Tensor:
        y = (y * routed.scale.unsqueeze(-1)).to(hidden.dtype)
        return torch.zeros_like(routed.x).index_add(0, routed.token, y).view(hidden.shape) + module.bias


class SharedExpert:
    """A shared expert, an MLP beside the others that all tokens pass: mlp(hidden (..., H)). A module of one expert,
    but only where it was told to count as one (`is_expert`); otherwise it is a few linears.
    """

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether it has the parts of one."""
        held = [module._modules.get(f"{name}_proj") for name in ("gate", "up", "down")]
        linears = [linear for linear in held if linear is not None]
        plain = all(type(linear).forward is nn.Linear.forward and linear.bias is None for linear in linears)
        has = None not in held[1:] and plain and activation_of(module) is not None
        return has and len(arguments(module)) == 1

    @staticmethod
    def matches(module: nn.Module) -> bool:
        return vars(module).get("is_expert", False)

    @staticmethod
    def flags(module: nn.Module) -> Flags:
        return Flags(activation_of(module), has_gate="gate_proj" in module._modules)

    @staticmethod
    def parameters(module: nn.Module) -> list[str]:
        return [f"{name}_proj.weight" for name in ("gate", "up", "down") if f"{name}_proj" in module._modules]

    @staticmethod
    def weights(module: nn.Module) -> dict[str, torch.Tensor]:
        names = SharedExpert.parameters(module)
        return {name.partition("_")[0]: module.get_parameter(name).unsqueeze(0) for name in names}

    @staticmethod
    def route(module: nn.Module, hidden) -> Routed:
        x = hidden.reshape(-1, hidden.shape[-1])
        every = torch.arange(len(x), device=x.device)
        return Routed(x, every, torch.zeros_like(every))

    @staticmethod
    def gather(module: nn.Module, y, routed: Routed, hidden) -> torch.Tensor:
        return y.to(hidden.dtype).view(hidden.shape)


FORMS = (Fused, Llama4, Dbrx, JetMoe, SharedExpert)


def form_of(module: nn.Module):
    """The form of a native experts module; None where it is none."""
    if not any(p.ndim > 1 for p in module.parameters(recurse=False)) and not module._modules:
        return None
    return next((form for form in FORMS if form.matches(module)), None)


def _holds_pair(module: nn.Module) -> bool:
    own = module._parameters
    first, down = own.get("gate_up_proj"), own.get("down_proj")
    if first is None and hasattr(module, "is_transposed"):  # else nobody could tell (E, I, H) from (E, H, I)
        first = own.get("up_proj")
    return first is not None and down is not None and first.dim() == 3 and down.dim() == 3


def _plain_flags(module: nn.Module) -> Flags:
    """Flags by the shapes: (E, 2I, H) and (E, H, I), or both transposed."""
    first, down = module.gate_up_proj.shape, module.down_proj.shape
    plain = first[1] == 2 * down[2] and first[2] == down[1]
    has_bias = module._parameters.get("down_proj_bias") is not None
    return Flags(activation_of(module), has_bias=has_bias, is_transposed=not plain)


def _count(module: nn.Module) -> int:
    return module.experts if hasattr(module, "native_class") else len(module.down_proj)
