"""Modules of ours as operators that torch.compile leaves alone: their kernels are compiled by numba, and how they go
through experts depends on where tokens are sent."""

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context


def make_known(name: str, call: nn.Module) -> None:
    """Compiled code knows a module by its name alone."""
    known = get_current_vllm_config().compilation_config.static_forward_context
    if name in known:
        raise ValueError(f"{name}: two layers have this name")
    known[name] = call


def _known(name: str):
    return get_forward_context().no_compile_layers[name]


@torch.library.custom_op("moesvd::experts", mutates_args=())
def experts(x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, name: str) -> torch.Tensor:
    """x (tokens, hidden), index and weights (tokens, k) -> (tokens, hidden)."""
    return _known(name)(x, index, weights)


@experts.register_fake
def _(x, index, weights, name):
    return torch.empty_like(x)


@torch.library.custom_op("moesvd::linear", mutates_args=())
def linear(x: torch.Tensor, out_features: int, name: str) -> torch.Tensor:
    """x (..., inputs) -> (..., out_features)."""
    return _known(name)(x)


@linear.register_fake
def _(x, out_features, name):
    return x.new_empty(*x.shape[:-1], out_features)
