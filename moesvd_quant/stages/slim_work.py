"""The work of stage `slim`.

An expert computes the same whatever the order of its channels. So those that stay are put first in every expert, and
all experts of a module have the same channels, 0 to k.
"""

from collections.abc import Iterator

import torch

from ..calibration.metric import blend, unknown
from ..checkpoint.layout import dense_part, layout_of
from ..decompose.channels import channel_losses, refit_down
from ..decompose.pruning import kept_channels, kept_counts
from ..decompose.whitening import whitened_error
from ..model.experts import dense_weight, expert_count, find_experts, flags_of, shapes_of
from ..model.remaining import is_gone, is_whole, members_of
from ..planning.context import (
    Context,
    Plan,
    StageError,
    expert_grams,
    factorized,
    fill,
    reached,
    require_experts,
    weak_experts,
)
from ..runtime.factorized_experts import FactorizedExperts
from ..runtime.parts import DensePart
from .slim import Slim


def plan(context: Context, options: Slim) -> Plan:
    """How many channels stay."""
    require_experts(context.parent)
    layout, decisions = layout_of(context.parent), {}
    for layer, name in zip(context.parent.layers, context.parent.layer_names):
        for path, experts in find_experts(layer):
            full, count = f"{name}.{path}", expert_count(experts)
            if is_gone(experts) or not is_whole(experts):
                raise StageError(f"{full}: is changed already, or its experts share matrices; slim takes whole ones")
            if flags_of(experts).has_bias:
                raise StageError(f"{full}: experts with biases cannot lose channels; use sparsify")
            channels = shapes_of(experts)["down"][1]
            kept, _ = kept_counts(channels, options.ratio, 0.0)
            layout.experts[full] = {p: [_slim_part(p, count, kept)] for p in shapes_of(experts)}
            decisions[full] = {"channels": kept, "of": channels}
    return Plan(layout, decisions)


def _slim_part(projection: str, experts: int, channels: int) -> DensePart:
    part = dense_part(list(range(experts)))
    part.rows, part.columns = (None, channels) if projection == "down" else (channels, None)
    return part


@torch.no_grad()
def run_layer(context: Context, options: Slim, index: int, layer, statistics: dict, plan: Plan) -> dict:
    """Puts experts with the channels that stay in the place of a loaded layer's. Returns the error of down on the
    inputs that all channels gave."""
    report = {}
    for path, native in list(find_experts(layer)):
        full = f"{context.parent.layer_names[index]}.{path}"
        sources = members_of(native)
        metric = blend if reached(statistics, path) else unknown
        grams = expert_grams(statistics, path, context.device, metric, sources)["down"]
        made = factorized(native, plan.layout.experts[full], (), getattr(native, "sources", None))
        errors: list[float] = []
        fill(made, _banks(native, made, grams, plan.decisions[full]["channels"], options, errors))
        layer.set_submodule(path, made)
        report[full] = {"down": errors, "weak_experts": weak_experts(statistics, path, sources)}
    return report


def _banks(
    native, made: FactorizedExperts, grams, count: int, options: Slim, errors: list[float]
) -> Iterator[tuple[str, int | None, torch.Tensor]]:
    """(bank, row, tensor) of all experts; the error of each down is added to `errors`."""
    yield "channels", None, torch.arange(count, dtype=torch.int32)
    for expert in range(made.experts):
        down, gram = dense_weight(native, "down", expert), grams[expert]
        kept = kept_channels(channel_losses(down, gram, options.damp), count)
        fitted = refit_down(down, gram, kept, options.damp)
        errors.append(whitened_error(down, torch.zeros_like(down).index_copy(1, kept, fitted.to(down.dtype)), gram))
        for projection in made.layout:
            weight = fitted if projection == "down" else dense_weight(native, projection, expert)[kept]
            yield f"{projection}_0_dense", expert, weight
