"""Linears: one of vLLM's may stand for several of ours (queries, keys and values), or for a projection of a shared
expert."""

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearMethodBase

from ...runtime.factorized_experts import FactorizedExperts
from ...runtime.parts import separate
from . import operators
from .sharding import split_experts


class SideBySide(nn.Module):
    """x (..., inputs) -> (..., outputs of all parts, one after the other)."""

    def __init__(self, parts: list[nn.Module]):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x):
        return torch.cat([part(x) for part in self.parts], -1) if len(self.parts) > 1 else self.parts[0](x)


class Projections(nn.Module):
    """The same of projections of a shared expert, a module of one expert that every token meets."""

    def __init__(self, expert: FactorizedExperts, names: list[str]):
        super().__init__()
        self.expert, self.names = expert, names

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        each = torch.arange(len(flat), device=x.device)
        held = [name for name in self.expert.shapes if (name == "down") == ("down" in self.names)]
        made = separate({name: self.expert.project(flat, each, torch.zeros_like(each), name, {}) for name in held})
        return torch.cat([made[name] for name in self.names], -1).view(*x.shape[:-1], -1)


class OurLinearMethod(LinearMethodBase):
    """A layer whose weight is in modules of ours."""

    def __init__(self, call: nn.Module):
        self.call = call

    def create_weights(
        self, layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype, **more
    ) -> None:
        self.name, self.out_features = f"{layer.prefix}.moesvd", sum(output_partition_sizes)
        operators.make_known(self.name, self.call)

    def process_weights_after_loading(self, layer) -> None:
        layer.moesvd = self.call

    def apply(self, layer, x, bias=None) -> torch.Tensor:
        y = operators.linear(x, self.out_features, self.name) if torch.compiler.is_compiling() else self.call(x)
        return y if bias is None else y + bias


class LinearMethod(OurLinearMethod):
    def __init__(self, parts: list[nn.Module]):
        super().__init__(SideBySide(parts))


class SharedExpertMethod(OurLinearMethod):
    """Two layers of vLLM share one expert: the one of down, which comes last, splits it."""

    def __init__(self, expert: FactorizedExperts, names: list[str]):
        super().__init__(Projections(expert, names))

    def process_weights_after_loading(self, layer) -> None:
        super().process_weights_after_loading(layer)
        if layer.tp_size > 1 and "down" in self.call.names:
            split_experts(self.call.expert, layer.tp_rank, layer.tp_size)
