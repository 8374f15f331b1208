"""The work of stage `prune`."""

from dataclasses import dataclass

import torch

from ..calibration.statistics import OUTPUTS
from ..checkpoint.layout import dense_layout, layout_of
from ..decompose.saliency import keep_in_layer, keep_in_model, saliency
from ..model.experts import dense_weight, expert_count, find_experts, is_shared, shapes_of
from ..planning.context import UNREACHED, Context, Plan, StageError, factorized, reached, require_experts
from ..runtime.modeling_moesvd import replace_experts
from ..runtime.routers import Router, router_of, why_not
from .prune import Prune


@dataclass
class Candidate:
    """An experts module that may lose some, its router, and those that have to stay."""

    index: int
    path: str
    full: str
    shapes: dict[str, tuple[int, int]]
    count: int
    router: Router
    protected: set[int]

    @property
    def least(self) -> int:
        """As many as a token is sent to, and one in each group."""
        return max(1, self.router.top_k, self.router.groups)


def plan(context: Context, options: Prune) -> Plan:
    """Which experts of each layer stay."""
    require_experts(context.parent)
    candidates = _candidates(context, options)
    scores: dict[str, torch.Tensor] = {}
    for index, statistics in enumerate(context.statistics.layers(context.progress)):
        for one in candidates:
            if one.index == index and reached(statistics, one.path):
                sums = (statistics[f"{one.path}/{name}"] for name in ("tokens", *OUTPUTS))
                scores[one.full] = saliency(options.by, *sums)
    found = [one for one in candidates if one.full in scores]
    if not found:
        raise StageError("no calibration token reached any expert; give other calibration text")
    kept = _kept(found, [scores[one.full] for one in found], options)
    layout, decisions = layout_of(context.parent), {}
    for one, stay in zip(found, kept):
        sources = [[expert] for expert in stay]
        if why := why_not(one.router, sources):
            raise StageError(f"{one.full}: prune leaves {len(stay)} of {one.count} experts: {why}; lower the ratio")
        layout.sources[one.full] = sources
        layout.experts[one.full] = dense_layout(len(stay), one.shapes)
        gone = sorted(set(range(one.count)) - set(stay))
        decisions[one.full] = {"left out": gone, "scores": scores[one.full].tolist()}
    unreached = {one.full: UNREACHED for one in candidates if one.full not in scores}
    return Plan(layout, decisions, {"kept whole": unreached} if unreached else {})


def _candidates(context: Context, options: Prune) -> list[Candidate]:
    """All modules of several experts, before any walk. StageError for a router that is not understood, and for
    protected experts that do not exist."""
    named = [tuple(map(int, place.split("."))) for place in options.protect]
    found = []
    for index, layer in enumerate(context.parent.layers):
        for path, experts in find_experts(layer):
            if is_shared(experts):
                continue
            full, count = f"{context.parent.layer_names[index]}.{path}", expert_count(experts)
            router = router_of(layer.get_submodule(path.rpartition(".")[0]), count)
            if router is None:
                raise StageError(f"{full}: cannot be pruned: {why_not(router, [])}")
            own = {expert for at, expert in named if at == index}
            found.append(Candidate(index, path, full, shapes_of(experts), count, router, own))
    places = {(one.index, expert) for one in found for expert in range(one.count)}
    for place in named:
        if place not in places:
            raise StageError(f"prune.protect: {place[0]}.{place[1]}: the model has no such layer or expert")
    return found


def _kept(found: list[Candidate], scores: list[torch.Tensor], options: Prune) -> list[list[int]]:
    """The experts of each module that stay. StageError, naming the module, where they cannot be chosen."""
    if options.scope == "model":
        if grouped := next((one.full for one in found if one.router.groups > 1), None):
            raise StageError(f"{grouped}: its router chooses among groups of one size; prune with scope: layer")
        count = round(sum(one.count for one in found) * (1 - options.ratio))
        try:
            return keep_in_model(scores, count, [one.least for one in found], [one.protected for one in found])
        except ValueError as error:
            raise StageError(f"prune.ratio {options.ratio}: {error}; lower it") from error
    kept = []
    for one, score in zip(found, scores):
        count = round(one.count * (1 - options.ratio) / one.router.groups) * one.router.groups
        try:
            kept.append(keep_in_layer(score, max(count, one.router.groups), one.router.groups, one.protected))
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
