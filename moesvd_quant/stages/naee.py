"""Which experts of each layer stay so that the layer's output changes least (NAEE, Lu et al. 2024)."""

import torch

from ..calibration.reconstruction import BlockWatch
from ..decompose.subsets import EXHAUSTIVE, best_subset
from ..model.experts import sums_by_token
from ..planning.context import Context, StageError
from .candidates import Candidate, require_servable
from .prune import Prune

SAMPLE = 2**13  # tokens on which subsets are compared


def require_comparable(one: Candidate, protected: int, options: Prune) -> None:
    """Before any walk: StageError where subsets of experts cannot be compared by their outputs, or there is none."""
    if one.router.groups > 1:
        raise StageError(f"{one.full}: its router chooses among groups of one size; prune by: reap")
    if not sums_by_token(one.experts):
        raise StageError(f"{one.full}: its experts' outputs depend on the router; prune by: reap")
    require_servable(one, one.first(options.ratio), "prune")
    if protected > (left := one.left(options.ratio)):
        raise StageError(f"{one.full}: {protected} experts are protected and {left} are to be kept; lower the ratio")


def subsets_of(
    context: Context, options: Prune, candidates: list[Candidate], protected: dict[int, set[int]]
) -> dict[str, torch.Tensor]:
    """{path: experts that stay (n,) int64, path/loss: of all subsets' ways the least ()}; computed once. On what the
    original gives each layer."""
    known = context.statistics
    every = -(-known.windows.numel() // SAMPLE)

    def make() -> dict[str, torch.Tensor]:
        made: dict[str, torch.Tensor] = {}
        for visit in known.model().walk(known.windows, known.batch_size, known.scratch(known.all_hidden(3))):
            own = [one for one in candidates if one.index == visit.index]
            watches = [_watch(visit.layer, one, every, known.scratch(_table(one))) for one in own]
            visit.outputs()
            for one, watch in zip(own, watches):
                watch.detach()
                kept = best_subset(one.count, one.left(options.ratio), protected[one.index], watch.loss)
                made[one.full] = torch.tensor(kept)
                made[f"{one.full}/loss"] = torch.tensor(watch.loss(kept), dtype=torch.float64)
            context.surveyed(visit.index + 1, known.count)
        return made

    depends = {"ratio": options.ratio, "protect": sorted(options.protect), "sample": SAMPLE, "all": EXHAUSTIVE}
    return known.kept("subsets", make, **depends)


def _watch(layer, one: Candidate, every: int, scratch) -> BlockWatch:
    home, _, name = one.path.rpartition(".")
    return BlockWatch(layer.get_submodule(home), name, every, scratch)


def _table(one: Candidate) -> int:
    """Bytes of all experts' outputs for the sample."""
    return 4 * SAMPLE * one.count * one.shapes["down"][0]
