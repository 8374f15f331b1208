"""Floating-point operations of a model, counted from its modules and layout (Table 11 of the paper)."""

from torch import nn

from ..model.experts import ROUTERS, find_experts, is_shared, shapes_of
from ..runtime.factorized_experts import FactorizedExperts
from ..runtime.stored import StoredLinear


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
        count["experts"] += 2 * expert_macs(experts, 1 if is_shared(experts) else top_k)
    attention = _attention_paths(model)
    count["attention"] += 2 * context * len(attention) * config.num_attention_heads * sum(_head_dims(config))
    homes = tuple(f"{path}." for path in attention)
    for path, module in model.named_modules():
        is_router = bool(ROUTERS & set(path.split(".")))
        if path.startswith(inside) and not is_router:
            continue
        weight = module._parameters.get("weight")
        kind = "router" if is_router else "attention" if path.startswith(homes) else "other"
        if isinstance(module, nn.Linear | StoredLinear):
            count[kind] += 2 * module.in_features * module.out_features
        elif weight is not None and weight.dim() == 2 and is_router:
            count["router"] += 2 * weight.numel()
        elif weight is not None and weight.dim() == 3:  # a mixture of projections (JetMoE): as many as are chosen
            count[kind] += 2 * top_k * weight[0].numel()
    return count | {"total": sum(count.values())}


def _attention_paths(model: nn.Module) -> list[str]:
    """Paths of the attention modules, by the name of their class: `self_attn` is not what all models call them."""
    found: list[str] = []
    for path, module in model.named_modules():
        if "attention" in type(module).__name__.lower() and not path.startswith(tuple(f"{home}." for home in found)):
            found.append(path)
    return found


def _head_dims(config) -> tuple[int, int]:
    """Dimensions of a head's query and of its value."""
    plain = getattr(config, "head_dim", None) or getattr(config, "kv_channels", None)
    plain = plain or config.hidden_size // config.num_attention_heads
    if getattr(config, "qk_nope_head_dim", None):
        return config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    return plain, plain


def expert_macs(experts: nn.Module, top_k: int) -> float:
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
