"""Floating-point operations of a model, counted from its modules and layout (Table 11 of the paper)."""

from torch import nn

from ..model.experts import ROUTERS, find_experts, is_shared, shapes_of
from ..model.factorized_experts import FactorizedExperts
from ..model.stored import StoredLinear


def flops_per_token(model: nn.Module, context: int) -> dict[str, float]:
    """{"experts", "router", "attention", "other", "total"} of one forward pass, per token; a multiplication with an
    addition counts two, as torch's FlopCounterMode has it. The model may be on the meta device.

    context: tokens that each token attends to; a kernel that computes whole squares, as torch counts them, attends to
    all of the sequence. Experts of different ranks count by their mean: a router that balances is assumed.
    Activations, norms and dequantization are left out, as everywhere.
    """
    config, count = model.config, dict.fromkeys(("experts", "router", "attention", "other"), 0.0)
    top_k = getattr(config, "num_experts_per_tok", 0)
    inside: tuple[str, ...] = ()
    for path, experts in find_experts(model):
        inside += (f"{path}.",)
        count["experts"] += 2 * _expert_macs(experts, 1 if is_shared(experts) else top_k)
    for path, module in model.named_modules():
        if path.startswith(inside):
            continue
        if path.endswith("self_attn"):
            count["attention"] += 2 * context * config.num_attention_heads * sum(_head_dims(config))
        weight = module._parameters.get("weight")
        if isinstance(module, nn.Linear | StoredLinear):
            kind = "attention" if ".self_attn." in f".{path}" else "other"
            kind = "router" if ROUTERS & set(path.split(".")) else kind
            count[kind] += 2 * module.in_features * module.out_features
        elif weight is not None and weight.dim() == 2 and ROUTERS & set(path.split(".")):
            count["router"] += 2 * weight.numel()
    return count | {"total": sum(count.values())}


def _head_dims(config) -> tuple[int, int]:
    """Dimensions of a head's query and of its value."""
    plain = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if getattr(config, "qk_nope_head_dim", None):
        return config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    return plain, plain


def _expert_macs(experts: nn.Module, top_k: int) -> float:
    """Multiply-adds of one token; banks that all experts share are met once per token, before routing."""
    if not isinstance(experts, FactorizedExperts):
        return top_k * sum(out * inner for out, inner in shapes_of(experts).values())
    total = 0.0
    for name, parts in experts.layout.items():
        for part in parts:
            share = top_k * len(part.experts) / experts.experts  # of the part's experts, per token
            for bank, (rows, columns) in part.sizes(*experts.shapes[name]).items():
                # Inputs of down differ between the experts of a token: a shared right factor meets each of them, a base
                # their sum where the module can make it.
                summed = bank == "dense" and hasattr(experts.form, "combine")
                once = bank == experts.shared_input(part) and (name != "down" or summed)
                total += (1 if once else share) * rows * columns
    return total
