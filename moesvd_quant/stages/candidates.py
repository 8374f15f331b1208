"""The experts modules that a stage may leave fewer matrices of, and their routers."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ..model.experts import expert_count, find_experts, is_shared, shapes_of
from ..model.stream import StreamedModel
from ..planning.context import Context, StageError, reached
from ..runtime.routers import Router, Sources, router_of, why_not


@dataclass
class Candidate:
    """A module of several experts, where it is, and its router."""

    index: int
    path: str
    full: str
    shapes: dict[str, tuple[int, int]]
    count: int
    router: Router
    block: nn.Module
    experts: nn.Module

    @property
    def least(self) -> int:
        """As many as a token is sent to, and one in each group."""
        return max(1, self.router.top_k, self.router.groups)

    def first(self, ratio: float) -> Sources:
        """As many experts as stay, the first in each group of the router: to ask whether it can serve so many."""
        size, left = self.count // self.router.groups, self.left(ratio) // self.router.groups
        return [[group * size + expert] for group in range(self.router.groups) for expert in range(left)]

    def left(self, ratio: float) -> int:
        """How many experts stay where a share `ratio` of them goes, as many in each group of the router; at least one
        in each."""
        groups = self.router.groups
        return max(round(self.count * (1 - ratio) / groups), 1) * groups


def require_servable(one: Candidate, sources: Sources, what: str) -> None:
    """StageError where the router of a module cannot serve the experts that `what` leaves."""
    if why := why_not(one.router, sources):
        raise StageError(f"{one.full}: {what} leaves {len(sources)} of {one.count} experts: {why}; lower the ratio")


def candidates_of(parent: StreamedModel, done: str) -> list[Candidate]:
    """All modules of several experts, before any walk. StageError for a router that is not understood; `done`: what
    was to be done to its experts."""
    found = []
    for index, (layer, name) in enumerate(zip(parent.layers, parent.layer_names)):
        for path, experts in find_experts(layer):
            if is_shared(experts):
                continue
            block, count = layer.get_submodule(path.rpartition(".")[0]), expert_count(experts)
            router = router_of(block, count)
            if router is None:
                raise StageError(f"{name}.{path}: cannot be {done}: {why_not(router, [])}")
            shapes = shapes_of(experts)
            found.append(Candidate(index, path, f"{name}.{path}", shapes, count, router, block, experts))
    return found


def reached_of(context: Context, candidates: list[Candidate]) -> Iterator[tuple[Candidate, dict]]:
    """Each module that a calibration token reaches, and the statistics of its layer."""
    for index, statistics in enumerate(context.statistics.layers(context.progress)):
        for one in candidates:
            if one.index == index and reached(statistics, one.path):
                yield one, statistics
