"""What a layer's output loses without each of its experts: MoE-I²'s importance of experts (Yang et al. 2024)."""

import torch

from ..calibration.reconstruction import BlockWatch
from ..model.experts import find_experts, sums_by_token
from ..model.remaining import sources_of
from ..planning.context import Context, StageError
from ..runtime.routers import why_not
from .candidates import candidates_of
from .naee import SAMPLE


def importance_of(context: Context, paths: list[str]) -> dict[str, list[float]]:
    """{path: importance of each expert that the stage is given, at least 0} of these experts modules; computed once.

    It is loss(all but this one) - loss(all). The loss is the norm of what the output of the original's block differs
    by, summed over the windows of a sample, when it has these experts alone and tokens are routed anew. An expert that
    is alone in its module, as a shared one is, counts 1.
    """
    left = {path: [group[0] for group in sources] for path, sources in _sources(context).items() if path in paths}
    several = {path: experts for path, experts in left.items() if len(experts) > 1}
    found = {path: [1.0] for path in left.keys() - several.keys()}
    return found | (_measured(context, several) if several else {})


def _sources(context: Context) -> dict[str, list[list[int]]]:
    """From which original experts those of each module of the input checkpoint come."""
    return {
        f"{name}.{path}": sources_of(experts)
        for layer, name in zip(context.parent.layers, context.parent.layer_names)
        for path, experts in find_experts(layer)
    }


def _measured(context: Context, left: dict[str, list[int]]) -> dict[str, list[float]]:
    known = context.statistics
    every = -(-known.windows.numel() // SAMPLE)
    model = known.model()
    candidates = [one for one in candidates_of(model, "judged") if one.full in left]
    for one in candidates:
        if one.router.groups > 1 or not sums_by_token(one.experts):
            raise StageError(f"{one.full}: its experts cannot be left out one by one; use svd.ranks: uniform")
        if why := why_not(one.router, [[expert] for expert in left[one.full][1:]]):
            raise StageError(f"{one.full}: without any one of its experts {why}; use svd.ranks: uniform")

    def make() -> dict[str, torch.Tensor]:
        made: dict[str, torch.Tensor] = {}
        for visit in model.walk(known.windows, known.batch_size, known.scratch(known.all_hidden(3))):
            own = [one for one in candidates if one.index == visit.index]
            watches = [_watch(visit.layer, one.path, every, context) for one in own]
            visit.outputs()
            for one, watch in zip(own, watches):
                watch.detach()
                kept = left[one.full]
                without = [watch.loss([e for e in kept if e != out]) for out in kept]
                made[one.full] = torch.tensor(without, dtype=torch.float64) - watch.loss(kept)
            context.surveyed(visit.index + 1, known.count)
        return made

    kept = known.kept("importance", make, experts=left, sample=SAMPLE)
    return {path: kept[path].clamp(min=0).tolist() for path in left}


def _watch(layer, path: str, every: int, context: Context) -> BlockWatch:
    home, _, name = path.rpartition(".")
    hidden = context.statistics.all_hidden(1)
    return BlockWatch(layer.get_submodule(home), name, every, context.statistics.scratch(hidden))
