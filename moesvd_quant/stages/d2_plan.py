"""The plan of stage `d2`: one base per projection, and deltas that spend what it leaves."""

from ..checkpoint.layout import factor_part, layout_of
from ..decompose.pruning import base_parameters, delta_ratio, kept_counts, rank_of
from ..decompose.ranks import level_ranks
from ..model.experts import expert_count, find_experts, is_shared, shapes_of
from ..planning.by_bytes import NotReachable, require_one_unknown, spend
from ..planning.context import Context, Plan, StageError, require_experts
from ..planning.parts import parts_by_rank
from ..planning.shares import kept_share
from ..runtime.factorized_experts import FactorizedExperts
from ..runtime.parts import DensePart, Projections
from .d2 import D2
from .paper import own_ranks


def plan(context: Context, options: D2) -> Plan:
    """One base per projection; one rank share for all deltas spends the rest of what the ratio or the budget leaves."""
    require_experts(context.parent)
    if options.needs_budget():
        require_one_unknown(context, "d2.ratio")
    layout, survey = layout_of(context.parent), _survey(context)
    if options.needs_budget():
        made = spend(context, lambda parameters: _decide(survey, parameters, options))
        layout.experts, decisions = made.experts, made.decisions
    else:
        left = options.ratio and kept_share(context.parent, options.ratio, options.ratio_of, survey)
        layout.experts, decisions = _decide(survey, int(left or 0), options)
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
    """Layouts and decisions of bases and deltas of `whole` parameters; of deltas of the given ratio, where it is."""
    kept = {
        path: kept_counts(entry["shapes"]["down"][1], options.static, options.dynamic) for path, entry in survey.items()
    }
    if options.delta_ratio is not None:
        ranks = _given_ranks(survey, options.delta_ratio)
    else:
        counted = {path: used if options.count == "used" else stored for path, (stored, used) in kept.items()}
        ranks = _ranks(survey, whole, counted, options)
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


def _given_ranks(survey: dict, ratio: float) -> dict[tuple[str, str], list[int]]:
    """Ranks of deltas that are `ratio` of their matrices. StageError where that is no rank at all."""
    ranks = {}
    for path, entry in survey.items():
        for projection, shape in entry["shapes"].items():
            rank = rank_of(ratio, shape)
            if rank == 0:
                raise StageError(f"{path}.{projection}: d2.delta_ratio {ratio}: leaves a delta no rank; raise it")
            ranks[path, projection] = [rank] * entry["experts"]
    return ranks


def _ranks(survey: dict, whole: int, counted: dict[str, int], options: D2) -> dict[tuple[str, str], list[int]]:
    """Ranks of the deltas of each (path, projection), one for each expert: they spend what the channels of the bases
    that are counted leave of `whole` parameters."""
    items = [(path, projection) for path, entry in survey.items() for projection in entry["shapes"]]
    counts = [survey[path]["experts"] for path, _ in items]
    shapes = [survey[path]["shapes"][projection] for path, projection in items]
    total = sum(count * out * in_features for count, (out, in_features) in zip(counts, shapes))
    bases = sum(
        base_parameters(list(entry["shapes"].values()), entry["shapes"]["down"][1], counted[path])
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
