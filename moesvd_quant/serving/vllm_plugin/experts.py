"""Routed experts: vLLM's router says where tokens go, our module computes."""

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from ...runtime.factorized_experts import FactorizedExperts
from . import operators
from .sharding import split_experts


class RoutedCall(nn.Module):
    """What vLLM calls: x (tokens, hidden), index and weights (tokens, k) -> (tokens, hidden)."""

    def __init__(self, experts: FactorizedExperts):
        super().__init__()
        self.experts = experts

    def forward(self, x, index, weights):
        return self.experts(x, index.long(), weights.to(x.dtype))


class ExpertsMethod(FusedMoEMethodBase):
    """A layer whose experts are a module of ours."""

    def __init__(self, moe, experts: nn.Module):
        super().__init__(moe)
        self.call = RoutedCall(experts)

    def create_weights(self, layer, **sizes) -> None:
        self.name = f"{layer.layer_name}.moesvd"
        operators.make_known(self.name, self.call)

    def process_weights_after_loading(self, layer) -> None:
        parallel = self.moe.moe_parallel_config
        if parallel.tp_size > 1:
            split_experts(self.call.experts, parallel.tp_rank, parallel.tp_size)
        layer.moesvd = self.call.experts

    def get_fused_moe_quant_config(self, layer):
        return None

    def apply(self, layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return operators.experts(x, topk_ids, topk_weights, self.name)
        return self.call(x, topk_ids, topk_weights)
