"""The work of stage `svd`."""

from collections.abc import Iterator
from functools import partial

import torch

from ..calibration.metric import shrink
from ..checkpoint.layout import layout_of
from ..decompose.baselines import asvd, fwsvd, plain_svd
from ..decompose.sensitivity import sampling_frequency
from ..decompose.sharing import SHARINGS, share_in_groups
from ..decompose.whitening import balance, refit_left, whitened_svd
from ..model.experts import expert_count, find_experts, shapes_of
from ..model.remaining import is_gone, is_whole, members_of, sources_of
from ..planning.allocation import plan_budget, plan_ratio
from ..planning.by_bytes import require_one_unknown, spend
from ..planning.choices import row_scale
from ..planning.context import (
    UNREACHED,
    Context,
    Plan,
    StageError,
    expert_grams,
    fill,
    reached,
    require_experts,
    weak_experts,
)
from ..planning.shares import kept_share, parameters_of
from ..runtime.factorized_experts import FactorizedExperts
from ..runtime.parts import DensePart
from .inputs import inputs_of, require_originals
from .paper import kept_lefts, plan_paper, shares_factors
from .paper_layers import mean_inputs, outlier_score, require_layers, survey_layer
from .rank_rules import plan_own
from .svd import Svd


def plan(context: Context, options: Svd) -> Plan:
    """Ranks of all experts under the ratio, by the method of the options."""
    require_experts(context.parent)
    if options.error_aware:
        require_originals(context.parent)
    if options.method != "global":
        _require_all(context, options)
    if options.method == "global":
        if options.ratio is None:
            return plan_budget(context, ranks=True)
        return plan_ratio(context, options.ratio, options.ratio_of)
    if options.needs_budget():
        require_one_unknown(context, "svd.ratio")
    require_layers(context.parent, options)
    survey, kept = _survey(context, options)
    layout = layout_of(context.parent)

    def decide(parameters: int) -> tuple[dict, dict]:
        if options.method == "moe_svd":
            return plan_paper(survey, parameters, options)
        return plan_own(context, survey, parameters, options)

    if options.needs_budget():
        others = parameters_of(context.parent) - parameters_of(context.parent, survey)
        made = spend(context, lambda parameters: decide(parameters - others))
        layout.experts, decisions = made.experts, made.decisions
    else:
        share = options.ratio and kept_share(context.parent, options.ratio, options.ratio_of, survey)
        layout.experts, decisions = decide(int(share or 0))
    for path, entry in survey.items():
        decisions.setdefault(path, {})["weak_experts"] = entry["weak"]
    return Plan(layout, decisions, {"kept in 16 bit": kept} if kept else {})


def _require_all(context: Context, options: Svd) -> None:
    """Before any walk: StageError where experts were merged, or left out for a method that asks statistics of all."""
    alone = options.method in ("plain", "svd_llm") and options.ranks in ("uniform", "importance") and not options.update
    for layer, name in zip(context.parent.layers, context.parent.layer_names):
        for path, experts in find_experts(layer):
            whole = is_whole(experts) and all(len(group) == 1 for group in sources_of(experts))
            if isinstance(experts, FactorizedExperts) and not (alone and whole):
                raise StageError(
                    f"{name}.{path}: some experts were left out or merged; svd.method {options.method} takes all: use "
                    "global"
                )


def prepare(context: Context, options: Svd, plan: Plan) -> Plan:
    """Fisher information takes a pass of its own over all layers."""
    if options.method == "fwsvd":
        context.statistics.measure_fisher("fisher-inputs", context.progress)
    return plan


def _survey(context: Context, options: Svd) -> tuple[dict[str, dict], dict[str, str]]:
    """Per experts module: shapes, and what the method needs of weights and statistics; and modules that are kept. Kept
    in `context.memo` for the next budget."""
    key = "survey", options.model_dump_json()
    if key not in context.memo:
        context.memo[key] = _surveyed(context, options)
    return context.memo[key]


def _surveyed(context: Context, options: Svd) -> tuple[dict[str, dict], dict[str, str]]:
    if options.method == "moe_svd" or options.ranks == "owl":
        found = dict(context.each_layer(partial(_survey_layer, options), context.surveyed))
    else:  # no weight is asked for: the input checkpoint may not be made yet
        layers, statistics = context.parent.layers, context.statistics.layers(context.progress)
        found = {i: _survey_layer(options, context, i, layers[i], own) for i, own in enumerate(statistics)}
    survey = {path: entry for index in sorted(found) for path, entry in found[index].items()}
    unreached = {path: UNREACHED for path, entry in survey.items() if entry is None}
    survey = {path: entry for path, entry in survey.items() if entry is not None}
    if not survey:
        raise StageError("no calibration token reached any expert; give other calibration text")
    return survey, unreached


def _survey_layer(options: Svd, context: Context, index: int, layer, statistics: dict) -> dict[str, dict | None]:
    """What the method needs of the experts modules of one layer; None for those that no token reached."""
    name = context.parent.layer_names[index]
    found: dict[str, dict | None] = {}
    for path, experts in find_experts(layer):
        full = f"{name}.{path}"
        if not reached(statistics, path):
            found[full] = None
            continue
        entry: dict = {"layer": index, "shapes": shapes_of(experts), "experts": expert_count(experts)}
        entry["weak"] = weak_experts(statistics, path, members_of(experts))
        if options.method == "moe_svd":
            entry |= survey_layer(experts, statistics, path, context.statistics.windows.numel(), options)
        if options.ranks == "owl":
            entry["outliers"] = outlier_score(experts, statistics, path)
        found[full] = entry
    return found


def run_layer(context: Context, options: Svd, index: int, layer, statistics: dict, plan: Plan) -> dict:
    """Replaces the experts of a loaded layer as planned. Returns errors per projection and expert."""
    report = {}
    walk = context.compressed_walk() if options.update else None
    pair = context.paired_walk() if options.error_aware else None
    if pair:
        pair.enter()
    seen = walk.statistics(index) if walk else {}
    for path, native in list(find_experts(layer)):
        full = f"{context.parent.layer_names[index]}.{path}"
        if full not in plan.layout.experts or is_gone(native):
            continue
        given = inputs_of(context, options.error_aware, native, statistics, path)
        after = expert_grams(seen, path, context.device, shrink) if seen else {}
        importance = _importance(context, options, statistics, path, full)
        frequency = sampling_frequency(statistics[f"{path}/tokens"], context.statistics.windows.numel())
        layout, prices = plan.layout.experts[full], plan.decisions[full].get("price", {})
        made = FactorizedExperts(native, layout)
        for name in sorted(layout, key=lambda name: name == "down"):  # whose inputs the others decide
            # The published methods are judged, and factorized, by each expert's own inputs.
            fitted = given.weights(name, made), given.grams(name, options.method == "global")
            scale = row_scale(prices, name, shapes_of(native)) if prices else None
            for i, part in enumerate(layout[name]):
                banks = _banks(part, *fitted, after.get(name), importance.get(name), scale, frequency, options)
                fill(made, ((f"{name}_{i}_{bank}", row, value) for bank, row, value in banks))
        layer.set_submodule(path, made)
        for either in (walk, pair):
            if either:
                either.replace(path, made)
        report[full] = given.errors(made)
    return report


def _importance(context: Context, options: Svd, statistics: dict, path: str, full: str) -> dict[str, torch.Tensor]:
    """What each input of each expert's matrices counts for by the method, (E, in) of each projection."""
    if options.method == "fwsvd":
        return context.statistics.by_fisher("fisher-inputs", full)
    return mean_inputs(statistics, path) if options.method == "asvd" else {}


def _banks(
    part, weights, grams, after, importance, scale, frequency, options
) -> Iterator[tuple[str, int | None, torch.Tensor]]:
    """(bank, row or None for all, tensor) of one part; the rows of shared factors are set in it.

    scale (out, 1): what an error in each row of the weights counts for; None: alike.
    """
    experts = part.experts
    if isinstance(part, DensePart):
        yield from (("dense", row, weights[e]) for row, e in enumerate(experts))
        return
    if shares_factors(options, len(weights)):
        make, kept = SHARINGS[options.share], kept_lefts(options, len(weights) // options.groups)
        made = share_in_groups(make, list(weights), grams, frequency, part.rank, kept, options.groups)
        part.left, part.right = made.left_rows, made.right_rows
        yield from (("left", None, made.left), ("right", None, made.right))
        return
    for row, e in enumerate(experts):
        weight = weights[e]
        if options.method == "plain":
            left, right = plain_svd(weight, part.rank)
        elif options.method == "asvd":
            left, right = asvd(weight, importance[e].to(weight.device), options.alpha, part.rank)
        elif options.method == "fwsvd":
            left, right = fwsvd(weight, importance[e].to(weight.device), part.rank)
        elif scale is not None:
            left, right = whitened_svd(weight.float() * scale.to(weight.device), grams[e], part.rank)
            left, right = balance(left / scale.to(left.device), right)
        else:
            left, right = whitened_svd(weight, grams[e], part.rank)
        if after is not None:  # SVD-LLM's closed-form update
            left = refit_left([weight], [after[e]], [right])
        yield from (("left", row, left), ("right", row, right))
