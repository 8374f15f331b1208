"""Stage `d2`: D2-MoE. The experts of a projection become one base and a low-rank delta each."""

import torch

from ..calibration.metric import shrink
from ..decompose.deltas import merge_base, share_deltas
from ..decompose.ranks import level_ranks
from ..decompose.whitening import whitened_svd
from ..layout import factor_part, layout_of, parts_by_rank
from ..model.experts import expert_count, find_experts, shapes_of, split_projections
from ..model.modeling_moesvd import FactorizedExperts
from .base import Context, Plan, StageError, errors_of, expert_grams, factorized, require_experts, weak_experts
from .paper import own_ranks


def plan(context: Context) -> Plan:
    """One base per projection; one rank share for all deltas spends the rest of what the ratio leaves."""
    require_experts(context.parent)
    options, layout = context.options, layout_of(context.parent)
    survey: dict[str, dict] = {}
    for layer, name in zip(context.parent.decoder.layers, context.parent.layer_names):
        for path, experts in find_experts(layer):
            if isinstance(experts, FactorizedExperts):
                raise StageError(f"{name}.{path}: is factorized already; stage d2 needs an original model")
            survey[f"{name}.{path}"] = {"experts": expert_count(experts), "shapes": shapes_of(experts)}
    items = [(path, projection) for path, entry in survey.items() for projection in entry["shapes"]]
    shapes = [survey[path]["shapes"][projection] for path, projection in items]
    total = sum(survey[path]["experts"] * out * i for (path, _), (out, i) in zip(items, shapes))
    bases = sum(out * in_features for out, in_features in shapes)
    left = max(int(total * (1 - options.ratio)) - bases, 0)
    if options.shared_v:
        units = [survey[path]["experts"] * out + i for (path, _), (out, i) in zip(items, shapes)]
        shared = level_ranks(units, [min(shape) for shape in shapes], left)
        ranks = {item: [rank] * survey[item[0]]["experts"] for item, rank in zip(items, shared)}
    else:
        ranks = own_ranks(survey, items, left)
    if min(map(min, ranks.values())) == 0:
        raise StageError(
            f"ratio {options.ratio}: the bases take {bases / total:.1%} of the expert parameters and "
            "leave some deltas no rank; lower it"
        )
    decisions: dict = {}
    for (path, projection), found in ranks.items():
        everyone = list(range(len(found)))
        base = {"experts": everyone, "dense": [0] * len(found), "quant": {}}
        deltas = [factor_part(everyone, found[0], right=[0] * len(found))] if options.shared_v else parts_by_rank(found)
        layout["experts"].setdefault(path, {})[projection] = [base, *deltas]
        decisions.setdefault(path, {}).setdefault("ranks", {})[projection] = found[0] if options.shared_v else found
    return Plan(layout, decisions)


def run_layer(context: Context, index: int, layer, statistics: dict, plan: Plan) -> dict:
    """Replaces the experts of a loaded layer as planned. Returns errors per projection and expert."""
    report = {}
    for path, native in list(find_experts(layer)):
        full = f"{context.parent.layer_names[index]}.{path}"
        grams = expert_grams(statistics, path, context.device, shrink)
        weights, tokens = split_projections(native), statistics[f"{path}/tokens"]
        layout = plan.layout["experts"][full]
        banks: dict[str, torch.Tensor] = {}
        for name, (_, *deltas) in layout.items():
            base = _base(context, full, name, weights[name], tokens)
            rest = weights[name].double() - base
            banks[f"{name}_0_dense"] = base[None]
            for i, part in enumerate(deltas, 1):
                if context.options.shared_v:
                    left, right = share_deltas(rest, grams[name], part["rank"])
                else:
                    pairs = [whitened_svd(rest[e], grams[name][e], part["rank"]) for e in part["experts"]]
                    left, right = (torch.stack(side) for side in zip(*pairs))
                banks |= {f"{name}_{i}_left": left, f"{name}_{i}_right": right}
        made = factorized(native, layout, banks)
        layer.set_submodule(path, made)
        report[full] = errors_of(made, weights, grams) | {"weak_experts": weak_experts(statistics, path)}
    return report


def _base(context: Context, full: str, name: str, weights, tokens) -> torch.Tensor:
    if context.options.merge == "fisher":
        return context.statistics.fisher_base(full, name, context.progress).to(weights.device).double()
    importance = tokens.double() if context.options.merge == "frequency" else torch.ones(len(weights))
    return merge_base(weights, importance.to(weights.device))
