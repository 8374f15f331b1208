"""The two reference models: eight wide experts as in Mixtral, and 64 narrow ones with a shared one as in Qwen2-MoE."""

from enum import StrEnum

from transformers import MixtralConfig, PretrainedConfig, PreTrainedTokenizerBase, Qwen2MoeConfig

HIDDEN = 256  # rows of 256, which llama.cpp's K and IQ types ask for
ROUTER_LOSS = 0.01


class Kind(StrEnum):
    mixtral = "mixtral"
    fine = "fine"


def config_of(kind: Kind, tokenizer: PreTrainedTokenizerBase, length: int) -> PretrainedConfig:
    """Mixtral of 9.9 M parameters (19.8 MB in bfloat16), or Qwen2-MoE of 15.3 M. Positions for `length` tokens.

    Fine experts: 8 of 64 are as wide together as the two of Mixtral, and the shared one is as wide as four of them.
    """
    common = {
        "vocab_size": len(tokenizer), "hidden_size": HIDDEN, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": length, "tie_word_embeddings": True, "router_aux_loss_coef": ROUTER_LOSS,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    if kind == Kind.mixtral:
        return MixtralConfig(
            **common, num_hidden_layers=5, intermediate_size=256, num_local_experts=8, num_experts_per_tok=2
        )
    return Qwen2MoeConfig(
        **common, num_hidden_layers=4, moe_intermediate_size=64, num_experts=64, num_experts_per_tok=8,
        norm_topk_prob=True, shared_expert_intermediate_size=256, mlp_only_layers=[],
    )  # fmt: skip
