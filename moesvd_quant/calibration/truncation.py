"""What it costs to truncate the experts of one projection of one layer, measured in one walk.

All truncated models go through the layers together, so that every layer is read once. There are as many of them as
projections of layers, times ratios, and each has its hidden states.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from ..memory.limits import Batches
from ..model.experts import find_experts, split_projections
from ..model.stream import StreamedModel

# The left (out, k) and right (k, in) factors of full rank of each expert's matrix: (layer, path, projection, weights).
Factors = Callable[[int, str, str, torch.Tensor], Sequence[tuple[torch.Tensor, torch.Tensor]]]


@torch.no_grad()
def truncation_losses(
    streamed: StreamedModel,
    windows: torch.Tensor,
    factors: Factors,
    ranks: Callable[[tuple[int, int]], Sequence[int]],
    batch_size: int = 8,
    progress: Callable[[int, int], None] = lambda done, total: None,
    scratch: Path | None = None,
) -> dict[tuple[str, str], list[float]]:
    """{(path of the experts module, projection): mean next-token loss, nats, at each rank of `ranks(shape)`} where all
    experts of this projection alone are truncated to that rank.

    windows (n, length) int64; scratch: folder for hidden states, memory where it is None.
    """
    variants: dict[tuple[str, str, int], Batches] = {}
    for visit in streamed.walk(windows, batch_size, scratch):
        variants = {key: visit.run(hidden) for key, hidden in variants.items()}
        for path, experts in find_experts(visit.layer):
            full = f"{streamed.layer_names[visit.index]}.{path}"
            for projection, weights in split_projections(experts).items():
                pairs, kept = factors(visit.index, path, projection, weights), weights.clone()
                for rank in ranks(tuple(weights.shape[1:])):
                    for weight, (left, right) in zip(weights, pairs):
                        weight.copy_(left[:, :rank] @ right[:rank])
                    variants[full, projection, rank] = visit.run(visit.hidden)
                weights.copy_(kept)
        progress(visit.index + 1, len(streamed.layer_names))
    found: dict[tuple[str, str], list[float]] = {}
    with streamed.output():
        for (full, projection, _), hidden in variants.items():
            found.setdefault((full, projection), []).append(_loss(streamed, hidden))
    return found


def _loss(streamed: StreamedModel, hidden: Batches) -> float:
    """Mean next-token loss of the walk's windows whose last hidden states are these."""
    total, count = 0.0, 0
    for states, batch in zip(hidden, streamed.batches):
        for own, ids in zip(states, batch):
            total += float(F.cross_entropy(streamed.head(own[None], ids[None])[0, :-1].float(), ids[1:]).double())
        count += len(batch)
    return total / count
