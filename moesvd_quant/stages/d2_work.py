"""The work of stage `d2`."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch

from ..calibration.metric import shrink
from ..checkpoint.layout import factor_part, layout_of
from ..decompose.deltas import merge_base, share_deltas
from ..decompose.pruning import (
    base_parameters,
    channel_scores,
    delta_ratio,
    kept_channels,
    kept_counts,
    output_energy,
    token_choice,
)
from ..decompose.ranks import level_ranks
from ..decompose.whitening import whitened_svd
from ..memory.lazy import LazySequence
from ..model.experts import expert_count, find_experts, is_shared, shapes_of, split_projections
from ..planning.by_bytes import NotReachable, require_one_unknown, spend
from ..planning.context import (
    Context,
    Plan,
    StageError,
    errors_of,
    expert_grams,
    factorized,
    require_experts,
    weak_experts,
)
from ..planning.parts import parts_by_rank
from ..planning.shares import kept_share
from ..runtime.factorized_experts import FactorizedExperts
from ..runtime.parts import DensePart, Projections
from .d2 import D2
from .paper import own_ranks


def plan(context: Context, options: D2) -> Plan:
    """One base per projection; one rank share for all deltas spends the rest of what the ratio or the budget leaves."""
    require_experts(context.parent)
    if options.ratio is None:
        require_one_unknown(context, "d2.ratio")
    layout, survey = layout_of(context.parent), _survey(context)
    if options.ratio is None:
        made = spend(context, lambda parameters: _decide(survey, parameters, options))
        layout.experts, decisions = made.experts, made.decisions
    else:
        left = kept_share(context.parent, options.ratio, options.ratio_of, survey)
        layout.experts, decisions = _decide(survey, int(left), options)
    return Plan(layout, decisions)


def _survey(context: Context) -> dict[str, dict]:
    """Number and shapes of all experts, by path. StageError for what has no base and deltas."""
    survey: dict[str, dict] = {}
    for layer, name in zip(context.parent.layers, context.parent.layer_names):
        for path, experts in find_experts(layer):
            if isinstance(experts, FactorizedExperts):
                raise StageError(f"{name}.{path}: is factorized already; stage d2 needs an original model")
            if is_shared(experts):
                raise StageError(
                    f"{name}.{path}: a shared expert is alone, it has no base and no delta; leave out experts: all"
                )
            survey[f"{name}.{path}"] = {"experts": expert_count(experts), "shapes": shapes_of(experts)}
    return survey


def _decide(survey: dict, whole: int, options: D2) -> tuple[dict[str, Projections], dict]:
    """Layouts and decisions of bases and deltas of `whole` parameters."""
    kept = {
        path: kept_counts(entry["shapes"]["down"][1], options.static, options.dynamic) for path, entry in survey.items()
    }
    ranks = _ranks(survey, whole, {path: stored for path, (stored, _) in kept.items()}, options)
    layouts: dict[str, Projections] = {}
    decisions: dict = {}
    for (path, projection), found in ranks.items():
        everyone = list(range(len(found)))
        base = DensePart(everyone, [0] * len(found))
        if options.static or options.dynamic:
            _prune(base, projection, "gate" in survey[path]["shapes"], *kept[path], bool(options.dynamic))
        deltas = [factor_part(everyone, found[0], right=[0] * len(found))] if options.shared_v else parts_by_rank(found)
        layouts.setdefault(path, {})[projection] = [base, *deltas]
        decision = decisions.setdefault(path, {"base channels": {"stored": kept[path][0], "used": kept[path][1]}})
        decision.setdefault("ranks", {})[projection] = found[0] if options.shared_v else found
        ratio = delta_ratio(sum(found) / len(found), survey[path]["shapes"][projection])
        decision.setdefault("delta_ratio", {})[projection] = round(ratio, 4)
    return layouts, decisions


def _ranks(survey: dict, whole: int, stored: dict[str, int], options: D2) -> dict[tuple[str, str], list[int]]:
    """Ranks of the deltas of each (path, projection), one for each expert: they spend what the bases leave of `whole`
    parameters."""
    items = [(path, projection) for path, entry in survey.items() for projection in entry["shapes"]]
    counts = [survey[path]["experts"] for path, _ in items]
    shapes = [survey[path]["shapes"][projection] for path, projection in items]
    total = sum(count * out * in_features for count, (out, in_features) in zip(counts, shapes))
    bases = sum(
        base_parameters(list(entry["shapes"].values()), entry["shapes"]["down"][1], stored[path])
        for path, entry in survey.items()
    )
    left = max(whole - bases, 0)
    if options.shared_v:
        units = [count * out + in_features for count, (out, in_features) in zip(counts, shapes)]
        shared = level_ranks(units, [min(shape) for shape in shapes], left)
        ranks = {item: [rank] * count for item, rank, count in zip(items, shared, counts)}
    else:
        ranks = own_ranks(survey, items, left)
    if min(map(min, ranks.values())) == 0:
        raise NotReachable(
            f"ratio {options.ratio}: the bases take {bases / total:.1%} of the expert parameters and "
            "leave some deltas no rank; lower it"
        )
    return ranks


def _prune(base: DensePart, projection: str, has_gate: bool, stored: int, used: int, dynamic: bool) -> None:
    """Makes a base a pruned one. The first projection is whole for every token: it makes the choice."""
    if projection == "down":
        base.columns = stored
    else:
        base.rows = stored
    if dynamic and (projection == "down" or (projection == "up" and has_gate)):
        base.dynamic = used


def prepare(context: Context, options: D2, plan: Plan, folder: Path) -> Plan:
    """Bases by Fisher information take a pass of their own over all layers."""
    if options.merge == "fisher":
        context.statistics.merge_bases(context.progress)
    return plan


def run_layer(context: Context, options: D2, index: int, layer, statistics: dict, plan: Plan) -> dict:
    """Replaces the experts of a loaded layer as planned. Returns errors per projection and expert."""
    report = {}
    for path, native in list(find_experts(layer)):
        full = f"{context.parent.layer_names[index]}.{path}"
        grams = expert_grams(statistics, path, context.device, shrink)
        weights, tokens = split_projections(native), statistics[f"{path}/tokens"]
        layout = plan.layout.experts[full]
        bases = {name: _base(context, options, full, name, weights[name], tokens) for name in layout}
        channels = _channels(bases, layout, statistics, path)
        banks = (
            (f"{name}_{bank}", row, value)
            for name, parts in layout.items()
            for bank, row, value in _banks(parts, weights[name], bases[name], grams[name], channels, options)
        )
        made = factorized(native, layout, chain(((key, None, value) for key, value in channels.items()), banks))
        layer.set_submodule(path, made)
        report[full] = errors_of(made, weights, grams) | {"weak_experts": weak_experts(statistics, path)}
    return report


def _banks(parts, weights, base, grams, channels, options) -> Iterator[tuple[str, int | None, torch.Tensor]]:
    """(bank, row or None for all, tensor) of one projection, whose parts are a base and then its deltas."""
    stored, held = _pruned_base(base, parts[0], channels.get("channels"))
    yield "0_dense", 0, stored
    # Deltas stand for what the base that is stored leaves over.
    rest = LazySequence(len(weights), lambda expert: weights[expert].double() - held)
    for i, part in enumerate(parts[1:], 1):
        if options.shared_v:
            left, right = share_deltas(rest, grams, part.rank)
            yield from ((f"{i}_left", None, left), (f"{i}_right", None, right))
            continue
        for row, expert in enumerate(part.experts):
            left, right = whitened_svd(rest[expert], grams[expert], part.rank)
            yield from ((f"{i}_left", row, left), (f"{i}_right", row, right))


def _base(context: Context, options: D2, full: str, name: str, weights, tokens) -> torch.Tensor:
    if options.merge == "fisher":
        return context.statistics.fisher_base(full, name).to(weights.device).double()
    importance = tokens.double() if options.merge == "frequency" else torch.ones(len(weights))
    return merge_base(weights, importance.to(weights.device))


def _pruned_base(
    base: torch.Tensor, part: DensePart, channels: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The base as it is stored, and the same at full size with zeros."""
    axis = 0 if part.rows else 1
    if channels is None:
        return base, base
    stored = base.index_select(axis, channels.to(base.device))
    return stored, torch.zeros_like(base).index_copy(axis, channels.long().to(base.device), stored)


def _channels(bases: dict, layout: Projections, statistics: dict, path: str) -> dict[str, torch.Tensor]:
    """The tensors of `factorized_experts.channel_tensors`, int32; none where the base is not pruned."""
    down = layout["down"][0]
    if down.columns is None:
        return {}
    tokens = int(statistics[f"{path}/tokens"].sum())
    gram_in, gram_mid = (sum(gram.double() for gram in statistics[f"{path}/{key}"]) for key in ("gram_in", "gram_mid"))
    wide = bases["down"].cpu()
    scores = channel_scores(gram_mid.diagonal() / tokens, wide)
    kept = kept_channels(scores, down.columns)
    if down.dynamic is None:
        return {"channels": kept.int()}
    up_energy = output_energy(bases["up"].cpu()[kept], gram_in, tokens) if "gate" in bases else torch.ones(len(kept))
    prior, weight = token_choice(scores[kept], wide[:, kept], up_energy)
    return {
        "channels": kept.int(),
        "channel_prior": prior.view(torch.int32),
        "channel_weight": weight.view(torch.int32),
    }
