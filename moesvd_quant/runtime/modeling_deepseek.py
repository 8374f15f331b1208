"""DeepSeekMoE-16B (`model_type: deepseek`), which transformers has no class for: Llama with a mixture of fine experts.

Dai et al. 2024, arXiv 2401.06066: softmax over all routed experts, the best k of them without renormalization (unless
`norm_topk_prob`), plus shared experts that every token meets, which are one wide MLP. A copy lies in every checkpoint.
"""

import copy

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import ACT2FN
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.integrations import use_experts_implementation
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaMLP, LlamaModel, LlamaPreTrainedModel


@strict
class DeepseekConfig(LlamaConfig):
    model_type = "deepseek"

    moe_intermediate_size: int = 1407
    n_shared_experts: int | None = None
    n_routed_experts: int | None = None
    num_experts_per_tok: int | None = None
    moe_layer_freq: int = 1
    first_k_dense_replace: int = 0
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"

    def is_sparse(self, layer: int) -> bool:
        late = layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0
        return self.n_routed_experts is not None and late


@use_experts_implementation
class DeepseekExperts(nn.Module):
    def __init__(self, config: DeepseekConfig):
        super().__init__()
        self.num_experts = config.n_routed_experts
        inner, hidden = config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, hidden, inner))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            token, position = torch.where(top_k_index == expert)
            y = self._apply_gate(F.linear(hidden_states[token], self.gate_up_proj[expert]))
            y = F.linear(y, self.down_proj[expert]) * top_k_weights[token, position, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out


class DeepseekRouter(nn.Module):
    def __init__(self, config: DeepseekConfig):
        super().__init__()
        self.top_k, self.renormalize = config.num_experts_per_tok, config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))

    def forward(self, hidden_states):
        logits = F.linear(hidden_states, self.weight)
        weights, index = logits.softmax(-1, dtype=torch.float32).topk(self.top_k, dim=-1)
        if self.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights.to(logits.dtype), index


class DeepseekMoE(nn.Module):
    def __init__(self, config: DeepseekConfig):
        super().__init__()
        self.gate, self.experts = DeepseekRouter(config), DeepseekExperts(config)
        self.shared_experts = None
        if config.n_shared_experts:
            wide = copy.copy(config)
            wide.intermediate_size = config.moe_intermediate_size * config.n_shared_experts
            self.shared_experts = LlamaMLP(wide)

    def forward(self, hidden_states):
        flat = hidden_states.view(-1, hidden_states.shape[-1])
        _, weights, index = self.gate(flat)
        out = self.experts(flat, index, weights).view(hidden_states.shape)
        return out if self.shared_experts is None else out + self.shared_experts(hidden_states)


class DeepseekPreTrainedModel(LlamaPreTrainedModel):
    config: DeepseekConfig
    _can_compile_fullgraph = False

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, DeepseekExperts | DeepseekRouter):
            for weight in module.parameters():
                nn.init.normal_(weight, std=self.config.initializer_range)


class DeepseekModel(DeepseekPreTrainedModel, LlamaModel):
    def __init__(self, config: DeepseekConfig):
        if config.scoring_func != "softmax":
            raise ValueError(f"config.json: scoring_func {config.scoring_func!r} of model_type deepseek is not known")
        LlamaModel.__init__(self, config)
        for index, layer in enumerate(self.layers):
            if config.is_sparse(index):
                layer.mlp = DeepseekMoE(config)
        self.post_init()


class DeepseekForCausalLM(DeepseekPreTrainedModel, LlamaForCausalLM):
    def __init__(self, config: DeepseekConfig):
        super(LlamaForCausalLM, self).__init__(config)  # not Llama's own, which would build a Llama
        self.model, self.vocab_size = DeepseekModel(config), config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


AutoConfig.register("deepseek", DeepseekConfig, exist_ok=True)
AutoModelForCausalLM.register(DeepseekConfig, DeepseekForCausalLM, exist_ok=True)
# Experts are fused as those of Qwen2-MoE, whose files have the same names.
register_checkpoint_conversion_mapping("deepseek", get_checkpoint_conversion_mapping("qwen2_moe"), overwrite=True)
