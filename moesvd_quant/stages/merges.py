"""Which experts of a model are merged, in which shares, and how their channels correspond: by each method."""

from typing import NamedTuple

import torch

from ..calibration.compressed import CompressedWalk
from ..calibration.routing import RouterWatch
from ..calibration.store import Statistics
from ..checkpoint.layout import dense_layout
from ..decompose.merging import (
    average,
    cosines,
    groups_of,
    join_few,
    join_most_alike,
    match_weights,
    ream_likeness,
    ream_order,
    shares_of,
)
from ..decompose.saliency import keep_in_layer, keep_in_model, saliency
from ..model.experts import dense_weights
from ..planning.context import Context, Progress, StageError, factorized, reached
from ..runtime.factorized_experts import FactorizedExperts
from ..runtime.modeling_moesvd import replace_experts
from ..runtime.parts import DensePart, Projections
from ..runtime.routers import Sources
from .candidates import Candidate, reached_of
from .merge import Merge

SAMPLE = 2**15  # tokens on which REAM compares what experts make of them


class Merges(NamedTuple):
    """Of the experts of a module: whose group each is in, its share of the group's average, and the order in which its
    channels stand for those of that leader."""

    leader: torch.Tensor  # (E,) int64
    share: torch.Tensor  # (E,) float64
    order: torch.Tensor  # (E, I) int32

    def tensors(self, full: str) -> dict[str, torch.Tensor]:
        return {f"{full}/{name}": value for name, value in self._asdict().items()}

    @staticmethod
    def of(tensors: dict[str, torch.Tensor], full: str) -> "Merges":
        return Merges(*(tensors[f"{full}/{name}"] for name in Merges._fields))

    @property
    def groups(self) -> list[list[int]]:
        """The experts of each group, its leader first."""
        return groups_of(self.leader)


def merged(native, merges: Merges, layout: Projections, sources: Sources | None) -> FactorizedExperts:
    """The module whose matrices are the groups' averages."""

    def banks():
        for row, group in enumerate(merges.groups):
            members = [dense_weights(native, expert) for expert in group]
            for name, weight in average(members, merges.order[group], merges.share[group]).items():
                yield f"{name}_0_dense", row, weight

    return factorized(native, layout, banks(), sources)


def rows_layout(shapes, groups: list[list[int]]) -> Projections:
    """Every expert as a row of a bank of one matrix for each group; a group's leader is named first."""
    experts = [expert for group in groups for expert in group]
    rows = [row for row, group in enumerate(groups) for _ in group]
    return {name: [DensePart(list(experts), list(rows))] for name in shapes}


def merges_of(context: Context, options: Merge, candidates: list[Candidate]) -> dict[str, torch.Tensor]:
    """{path/field: tensor} of `Merges` for each module that a token reaches; computed once."""

    def make() -> dict[str, torch.Tensor]:
        known, report = context.statistics, context.surveyed
        if options.method == "ream":
            return _ream(known, options, candidates, report)
        return _mc_smoe(context, options, candidates, report)

    return context.statistics.kept("merges", make, options=options.model_dump(), sample=SAMPLE)


def _own_order(count: int, inner: int) -> torch.Tensor:
    return torch.arange(inner, dtype=torch.int32).repeat(count, 1)


def _mc_smoe(context: Context, options: Merge, candidates: list[Candidate], report: Progress) -> dict:
    """MC-SMoE (Li et al., ICLR 2024): the most used experts of the model lead, by their share of the tokens of their
    layer; each other one joins that of its layer whose router logits are most like its own."""
    known = context.statistics
    tokens = {one.full: seen[f"{one.path}/tokens"].double() for one, seen in reached_of(context, candidates)}
    found = [one for one in candidates if one.full in tokens]
    count = round(sum(one.count for one in found) * (1 - options.ratio))
    try:
        leaders = keep_in_model([tokens[one.full] for one in found], count, [1] * len(found), [()] * len(found))
    except ValueError as error:
        raise StageError(f"merge.ratio {options.ratio}: {error}; lower it") from error
    grams = _logit_grams(known, found, report)
    made: dict[str, torch.Tensor] = {}
    for one, lead in zip(found, leaders):
        leader = join_most_alike(cosines(grams[one.full]), lead)
        order = _own_order(one.count, one.shapes["down"][1])
        experts = context.parent.load_layer(one.index).get_submodule(one.path)
        for expert, first in enumerate(leader.tolist()):
            if expert != first:
                order[expert] = match_weights(dense_weights(experts, first), dense_weights(experts, expert))
        context.parent.drop_layer(one.index)
        made |= Merges(leader, shares_of(leader, tokens[one.full]), order).tensors(one.full)
    return made


def _logit_grams(known: Statistics, candidates: list[Candidate], report: Progress) -> dict[str, torch.Tensor]:
    """Sums over tokens of the products of the router's logits, {path: (E, E)}."""
    streamed, found = known.model(), {}
    for visit in streamed.walk(known.windows, known.batch_size, known.scratch(known.all_hidden(2))):
        watches = {one.full: _watch(visit.layer, one) for one in candidates if one.index == visit.index}
        visit.outputs()
        for full, watch in watches.items():
            watch.detach()
            found[full] = watch.gram
        report(visit.index + 1, known.count)
    return found


def _watch(layer, one: Candidate, every: int | None = None, scratch=None) -> RouterWatch:
    experts = layer.get_submodule(one.path)
    return RouterWatch(layer.get_submodule(one.path.rpartition(".")[0]), experts, every, scratch)


def _ream(known: Statistics, options: Merge, candidates: list[Candidate], report: Progress) -> dict:
    """REAM (Jha et al., 2026), layer after layer on what the merged ones before give: the experts that REAP would keep
    lead, and the rest joins the first of them."""
    walk = CompressedWalk(known.folder, known)
    made: dict[str, torch.Tensor] = {}
    every = -(-known.windows.numel() // SAMPLE)
    for index in range(known.count):
        statistics = walk.statistics(index)
        visit = walk.visit
        own = [one for one in candidates if one.index == index and reached(statistics, one.path)]
        watches = [_watch(visit.layer, one, every, known.scratch(known.all_hidden(3))) for one in own]
        if own:
            visit.run(visit.hidden)
        for one, watch in zip(own, watches):
            watch.detach()
            merges = _ream_of(options, one, statistics, watch)
            made |= merges.tensors(one.full)
            layout = dense_layout(len(merges.groups), one.shapes)
            replace_experts(visit.layer, one.path, merged(watch.experts, merges, layout, merges.groups))
        report(index + 1, known.count)
    return made


def _ream_of(options: Merge, one: Candidate, statistics: dict, watch: RouterWatch) -> Merges:
    sums = (statistics[f"{one.path}/{name}"] for name in ("tokens", "router_weight", "output_norm", "weighted_norm"))
    worth = saliency("reap", *sums)
    # Unused experts are merged as the least used one would be.
    worth = worth.where(worth > 0, min([0.5, *worth[worth > 0].tolist()]))
    leaders = keep_in_layer(worth, one.left(options.ratio), one.router.groups, ())
    leader = join_few(ream_likeness(watch.gram, watch.gated_outputs()), worth, leaders, options.group_size)
    order = _own_order(one.count, one.shapes["down"][1])
    for expert, first in enumerate(leader.tolist()):
        if expert != first:
            weights = dense_weights(watch.experts, first), dense_weights(watch.experts, expert)
            order[expert] = ream_order(weights, *watch.products(first, expert))
    return Merges(leader, shares_of(leader, worth), order)
