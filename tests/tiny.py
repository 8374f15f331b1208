"""Tiny models of real architectures, made from configs, and a tokenizer whose tokens are bytes."""

import gc

import torch
import transformers
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

_COMMON = dict(
    vocab_size=320,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)
# Every shape in which transformers 5 fuses experts: plain, shared experts, dense first layer, transposed with biases.
ARCHITECTURES = {
    "mixtral": ("MixtralConfig", dict(intermediate_size=96, num_local_experts=4, num_experts_per_tok=2)),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        dict(
            moe_intermediate_size=32, intermediate_size=96, shared_expert_intermediate_size=64, num_experts=6,
            num_experts_per_tok=2, decoder_sparse_step=1, mlp_only_layers=[],
        ),
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        dict(
            moe_intermediate_size=32, intermediate_size=96, num_experts=6, num_experts_per_tok=2, head_dim=16,
            decoder_sparse_step=1, mlp_only_layers=[], norm_topk_prob=True,
        ),
    ),
    "olmoe": ("OlmoeConfig", dict(intermediate_size=32, num_experts=6, num_experts_per_tok=2)),
    "phimoe": ("PhimoeConfig", dict(intermediate_size=96, num_local_experts=4, num_experts_per_tok=2)),
    "gpt_oss": (
        "GptOssConfig",
        dict(
            intermediate_size=64, num_local_experts=4, num_experts_per_tok=2, head_dim=16, sliding_window=64,
            layer_types=["sliding_attention", "full_attention"],
        ),
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        dict(
            intermediate_size=96, moe_intermediate_size=32, n_routed_experts=9, n_shared_experts=1,
            num_experts_per_tok=2, first_k_dense_replace=1, kv_lora_rank=32, q_lora_rank=None, qk_nope_head_dim=16,
            qk_rope_head_dim=16, v_head_dim=16, num_key_value_heads=4, n_group=3, topk_group=2,
        ),
    ),
    "deepseek_v2": (
        "DeepseekV2Config",
        dict(
            intermediate_size=96, moe_intermediate_size=32, n_routed_experts=6, n_shared_experts=1,
            num_experts_per_tok=2, first_k_dense_replace=1, kv_lora_rank=32, q_lora_rank=None, qk_nope_head_dim=16,
            qk_rope_head_dim=16, v_head_dim=16, num_key_value_heads=4, n_group=1, topk_group=1, topk_method="greedy",
        ),
    ),
}  # fmt: skip


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens: any text, no training."""
    made = ByteLevelBPETokenizer()
    made.train_from_iterator(["ab"], vocab_size=257, special_tokens=["<|endoftext|>"])
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, bos_token=end, eos_token=end, pad_token=end)


@torch.no_grad()
def enlarge(model) -> None:
    """Draws weights anew, so large that experts matter."""
    for key, tensor in model.named_parameters():
        if tensor.dim() > 1 and "embed" not in key:
            tensor.copy_(torch.randn_like(tensor) * tensor.shape[-1] ** -0.5)
        elif "bias" in key or "sinks" in key:
            tensor.copy_(torch.randn_like(tensor) * 0.1)


@torch.no_grad()
def fill_banks(experts, generator) -> None:
    """Random float banks of a FactorizedExperts."""
    for key, _ in experts.banks():
        bank = getattr(experts, key)
        bank.copy_(torch.randn(bank.shape, generator=generator) * bank.shape[-1] ** -0.5)


def tiny_model(architecture: str, dtype=torch.float32, seed: int = 0, **more):
    """A random model whose weights are large enough that experts matter; `more` goes to the config."""
    name, options = ARCHITECTURES[architecture]
    torch.manual_seed(seed)
    config = getattr(transformers, name)(**(_COMMON | options | more))
    model = AutoModelForCausalLM.from_config(config)
    enlarge(model)
    return model.to(dtype).eval()


def tensor_bytes() -> int:
    """Bytes of all tensors that live in this process, wherever they are held."""
    tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    storages = [x.untyped_storage() for x in tensors if x.device.type != "meta"]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
