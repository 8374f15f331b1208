"""transformers' grouped products in the type of autocast; by themselves they stay in float32, as the weights are."""

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

NAME = "grouped_mm_in_autocast"


class Cast:
    """Experts whose weights are read in another type; gradients reach the weights themselves."""

    def __init__(self, experts: nn.Module, dtype: torch.dtype):
        self.experts, self.dtype = experts, dtype

    def __getattr__(self, name: str):
        value = getattr(self.experts, name)
        return value.to(self.dtype) if isinstance(value, nn.Parameter) else value


def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
    """Outputs (tokens, hidden) of the experts; called as every experts implementation of transformers is."""
    device = hidden_states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.down_proj.dtype
    return grouped_mm_experts_forward(Cast(self, dtype), hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(NAME, forward)
