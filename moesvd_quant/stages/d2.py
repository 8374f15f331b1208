"""Stage `d2`: D2-MoE. The experts of a projection become one base and a low-rank delta each."""

from collections.abc import Iterator
from pathlib import Path

import torch

from ..allocate import level_ranks
from ..calibration.metric import shrink
from ..decompose.deltas import merge_base, share_deltas
from ..decompose.whitening import whitened_svd
from ..layout import factor_part, layout_of
from ..lazy import Lazily
from ..model.experts import expert_count, find_experts, shapes_of, split_projections
from ..model.modeling_moesvd import FactorizedExperts
from .base import Context, Plan, StageError, errors_of, expert_grams, factorized, require_experts, weak_experts


def plan(context: Context) -> Plan:
    """One base per projection; one rank share for all deltas spends the rest of what the ratio leaves."""
    require_experts(context.parent)
    layout, groups = layout_of(context.parent), {}
    for layer, name in zip(context.parent.layers, context.parent.layer_names):
        for path, experts in find_experts(layer):
            if isinstance(experts, FactorizedExperts):
                raise StageError(f"{name}.{path}: is factorized already; stage d2 needs an original model")
            for projection, shape in shapes_of(experts).items():
                groups[f"{name}.{path}", projection] = expert_count(experts), shape
    total = sum(count * out * in_features for count, (out, in_features) in groups.values())
    bases = sum(out * in_features for _, (out, in_features) in groups.values())
    left = int(total * (1 - context.options.ratio)) - bases
    units = [
        count * out + (1 if context.options.shared_v else count) * in_features
        for count, (out, in_features) in groups.values()
    ]
    ranks = level_ranks(units, [min(shape) for _, shape in groups.values()], max(left, 0))
    if min(ranks) == 0:
        raise StageError(
            f"ratio {context.options.ratio}: the bases take {bases / total:.1%} of the expert parameters and "
            "leave some deltas no rank; lower it"
        )
    decisions: dict = {}
    for ((path, projection), (count, _)), rank in zip(groups.items(), ranks):
        everyone = list(range(count))
        right = [0] * count if context.options.shared_v else None
        base = {"experts": everyone, "dense": [0] * count, "quant": {}}
        layout["experts"].setdefault(path, {})[projection] = [base, factor_part(everyone, rank, right=right)]
        decisions.setdefault(path, {}).setdefault("ranks", {})[projection] = rank
    return Plan(layout, decisions)


def prepare(context: Context, plan: Plan, folder: Path) -> Plan:
    """Bases by Fisher information take a pass of their own over all layers."""
    if context.options.merge == "fisher":
        context.statistics.merge_bases(context.progress)
    return plan


def run_layer(context: Context, index: int, layer, statistics: dict, plan: Plan) -> dict:
    """Replaces the experts of a loaded layer as planned. Returns errors per projection and expert."""
    report = {}
    for path, native in list(find_experts(layer)):
        full = f"{context.parent.layer_names[index]}.{path}"
        grams = expert_grams(statistics, path, context.device, shrink)
        weights, tokens = split_projections(native), statistics[f"{path}/tokens"]
        layout = plan.layout["experts"][full]
        bases = {name: _base(context, full, name, weights[name], tokens) for name in layout}
        banks = (
            (f"{name}_{bank}", row, value)
            for name, (_, deltas) in layout.items()
            for bank, row, value in _banks(weights[name], bases[name], grams[name], deltas["rank"], context.options)
        )
        made = factorized(native, layout, banks)
        layer.set_submodule(path, made)
        report[full] = errors_of(made, weights, grams) | {"weak_experts": weak_experts(statistics, path)}
    return report


def _banks(weights, base, grams, rank: int, options) -> Iterator[tuple[str, int | None, torch.Tensor]]:
    """(bank, row or None for all, tensor) of one projection."""
    yield "0_dense", 0, base
    deltas = Lazily(len(weights), lambda expert: weights[expert].double() - base)
    if options.shared_v:
        left, right = share_deltas(deltas, grams, rank)
        yield from (("1_left", None, left), ("1_right", None, right))
        return
    for expert, delta in enumerate(deltas):
        left, right = whitened_svd(delta, grams[expert], rank)
        yield from (("1_left", expert, left), ("1_right", expert, right))


def _base(context: Context, full: str, name: str, weights, tokens) -> torch.Tensor:
    if context.options.merge == "fisher":
        return context.statistics.fisher_base(full, name).to(weights.device).double()
    importance = tokens.double() if context.options.merge == "frequency" else torch.ones(len(weights))
    return merge_base(weights, importance.to(weights.device))
