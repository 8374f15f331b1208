"""The work of stage `prune`."""

import torch

from ..calibration.statistics import OUTPUTS
from ..checkpoint.layout import dense_layout, layout_of
from ..decompose.saliency import keep_in_layer, keep_in_model, saliency
from ..model.experts import dense_weight, find_experts, shapes_of
from ..planning.context import UNREACHED, Context, Plan, StageError, factorized, require_experts
from ..runtime.modeling_moesvd import replace_experts
from .candidates import Candidate, candidates_of, reached_of, require_servable
from .naee import require_comparable, subsets_of
from .prune import Prune

Chosen = dict[str, tuple[list[int], dict]]  # by path: the experts that stay, and figures for the manifest


def plan(context: Context, options: Prune) -> Plan:
    """Which experts of each layer stay."""
    require_experts(context.parent)
    candidates = candidates_of(context.parent, "pruned")
    protected = _protected(candidates, options.protect)
    choose = _by_reconstruction if options.by == "reconstruction" else _by_scores
    chosen = choose(context, options, candidates, protected)
    if not chosen:
        raise StageError("no calibration token reached any expert; give other calibration text")
    layout, decisions = layout_of(context.parent), {}
    unreached = {one.full: UNREACHED for one in candidates if one.full not in chosen}
    for one in candidates:
        if one.full in chosen:
            stay, figures = chosen[one.full]
            sources = [[expert] for expert in stay]
            require_servable(one, sources, "prune")
            layout.sources[one.full] = sources
            layout.experts[one.full] = dense_layout(len(stay), one.shapes)
            decisions[one.full] = {"left out": sorted(set(range(one.count)) - set(stay)), **figures}
    return Plan(layout, decisions, {"kept whole": unreached} if unreached else {})


def _by_scores(context: Context, options: Prune, candidates: list[Candidate], protected: dict[int, set[int]]) -> Chosen:
    """By a number for each expert."""
    scores: dict[str, torch.Tensor] = {}
    for one, statistics in reached_of(context, candidates):
        scores[one.full] = saliency(options.by, *(statistics[f"{one.path}/{name}"] for name in ("tokens", *OUTPUTS)))
    found = [one for one in candidates if one.full in scores]
    kept = _kept(found, [scores[one.full] for one in found], options, protected) if found else []
    return {one.full: (stay, {"scores": scores[one.full].tolist()}) for one, stay in zip(found, kept)}


def _by_reconstruction(
    context: Context, options: Prune, candidates: list[Candidate], protected: dict[int, set[int]]
) -> Chosen:
    """By what the layer's output loses without them together."""
    for one in candidates:
        require_comparable(one, len(protected[one.index]), options)
    found = [one for one, _ in reached_of(context, candidates)]
    subsets = subsets_of(context, options, found, protected)
    return {one.full: (subsets[one.full].tolist(), {"loss": float(subsets[f"{one.full}/loss"])}) for one in found}


def _protected(candidates: list[Candidate], places: list[str]) -> dict[int, set[int]]:
    """Experts that stay, by layer. StageError for one that does not exist."""
    known = {(one.index, expert) for one in candidates for expert in range(one.count)}
    found: dict[int, set[int]] = {one.index: set() for one in candidates}
    for place in places:
        layer, expert = map(int, place.split("."))
        if (layer, expert) not in known:
            raise StageError(f"prune.protect: {place}: the model has no such layer or expert")
        found[layer].add(expert)
    return found


def _kept(
    found: list[Candidate], scores: list[torch.Tensor], options: Prune, protected: dict[int, set[int]]
) -> list[list[int]]:
    """The experts of each module that stay. StageError, naming the module, where they cannot be chosen."""
    if options.scope == "model":
        if grouped := next((one.full for one in found if one.router.groups > 1), None):
            raise StageError(f"{grouped}: its router chooses among groups of one size; prune with scope: layer")
        count = round(sum(one.count for one in found) * (1 - options.ratio))
        try:
            return keep_in_model(scores, count, [one.least for one in found], [protected[one.index] for one in found])
        except ValueError as error:
            raise StageError(f"prune.ratio {options.ratio}: {error}; lower it") from error
    kept = []
    for one, score in zip(found, scores):
        try:
            kept.append(keep_in_layer(score, one.left(options.ratio), one.router.groups, protected[one.index]))
        except ValueError as error:
            raise StageError(f"{one.full}: prune.ratio {options.ratio}: {error}; lower it") from error
    return kept


def run_layer(context: Context, index: int, layer, plan: Plan) -> dict:
    """Puts the experts that stay, and their rows of the router, in the place of all."""
    for path, native in list(find_experts(layer)):
        full = f"{context.parent.layer_names[index]}.{path}"
        sources = plan.layout.sources.get(full)
        if sources is None:
            continue
        banks = (
            (f"{name}_0_dense", at, dense_weight(native, name, expert))
            for name in shapes_of(native)
            for at, (expert,) in enumerate(sources)
        )
        replace_experts(layer, path, factorized(native, plan.layout.experts[full], banks, sources))
    return {}
