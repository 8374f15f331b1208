"""What a call of experts is made of, whatever architecture they are of. A copy lies in every checkpoint."""

import inspect
from typing import Any, NamedTuple

import torch
from torch import nn


class Routed(NamedTuple):
    """The pairs of a call, sorted by expert."""

    x: torch.Tensor  # (tokens, hidden)
    token: torch.Tensor  # (pairs,) row of x
    expert: torch.Tensor  # (pairs,)
    scale: Any = None  # (pairs,) what the output is multiplied by
    row: Any = None  # (pairs,) where the output goes


class Flags(NamedTuple):
    """What an experts module is like, whatever names its class has for it."""

    act_fn: Any = None  # none where the class has a gate of its own
    has_gate: bool = True
    has_bias: bool = False
    has_post_expert_norm: bool = False
    is_concatenated: bool = True  # gate above up in one matrix; else their rows alternate
    is_transposed: bool = False  # weights are (in, out)


def apply_gate(module: nn.Module, native_class: type, joint: torch.Tensor, act_fn) -> torch.Tensor:
    """Input of down from the joint output of gate and up, by the native class's own gate where it has one."""
    if hasattr(native_class, "_apply_gate"):
        return native_class._apply_gate(module, joint)
    gate, up = joint.chunk(2, -1)
    return act_fn(gate) * up


def add_bias(module: nn.Module, flags: Flags, pairs: dict, ids: torch.Tensor) -> None:
    """Adds the biases of gate and up, of the experts `ids` (n), to their outputs (n, out)."""
    if not flags.has_bias:
        return
    bias = getattr(module, "gate_up_proj_bias" if flags.has_gate else "up_proj_bias")[ids]
    if not flags.has_gate:
        pairs["up"] = pairs["up"] + bias
        return
    gate, up = bias.chunk(2, -1) if flags.is_concatenated else (bias[..., ::2], bias[..., 1::2])
    pairs["gate"], pairs["up"] = pairs["gate"] + gate, pairs["up"] + up


def arguments(module: nn.Module) -> list[str]:
    """What the class's forward is called with."""
    found = list(inspect.signature(type(module).forward).parameters.values())[1:]
    return [p.name for p in found if p.kind is p.POSITIONAL_OR_KEYWORD]


def activation_of(module: nn.Module):
    """The activation function of a module, by any of its usual names; None where it has none."""
    return next((getattr(module, name) for name in ("act_fn", "activation_fn", "act") if hasattr(module, name)), None)
