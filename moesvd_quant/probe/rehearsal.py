"""Truncation rehearsed: what the planned ranks do to the loss on a few thousand tokens, with nothing written.

All ratios go through the layers together, so that every layer is read, and every expert factorized, once per text.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F

from ..allocate import DENSE
from ..calibration.metric import blend
from ..calibration.store import EFFECT_BATCH, Statistics
from ..decompose.whitening import output_basis
from ..memory import Batches
from ..model.experts import find_experts, split_projections
from ..model.stream import StreamedModel
from ..stages.base import expert_grams, reached

TOKENS = 16384  # of a text

Ranks = dict[tuple[str, str], list[int]]  # of the experts of (path, projection)


@torch.no_grad()
def rehearse(
    streamed: StreamedModel,
    windows: torch.Tensor,
    calibration: Statistics,
    ranks: dict[float, Ranks],
    scratch: Path | None = None,
) -> dict[float, float]:
    """{ratio: rise of the loss, nats per predicted token} on the first TOKENS of windows (n, length) int64.

    Experts are truncated to the ranks of each ratio under the calibration's metric, as stage `svd` does it.
    """
    windows = windows[: max(1, TOKENS // windows.shape[1])]
    variants: dict[float, Batches] = {}
    for visit, statistics in zip(streamed.walk(windows, EFFECT_BATCH, scratch), calibration.layers()):
        groups = _bases(visit.layer, streamed.layer_names[visit.index], statistics, streamed.device)
        here = {}
        for ratio, used in ranks.items():
            with _truncated(groups, used):
                here[ratio] = visit.run(variants.get(ratio, visit.hidden))
        variants = here
    with streamed.output():
        before = _loss(streamed, streamed.hidden)
        return {ratio: _loss(streamed, hidden) - before for ratio, hidden in variants.items()}


def _bases(layer, name: str, statistics: dict, device) -> dict:
    """{(path, projection): (weights (E, out, in), output basis (out, k) of each expert, best direction first)}."""
    found = {}
    for path, experts in find_experts(layer):
        if not reached(statistics, path):
            continue
        metrics = expert_grams(statistics, path, device, blend)
        for projection, weights in split_projections(experts).items():
            pairs = zip(weights, metrics[projection])
            bases = [output_basis(w, metric, min(w.shape)).to(w.dtype) for w, metric in pairs]
            found[f"{name}.{path}", projection] = weights, bases
    return found


@contextmanager
def _truncated(groups: dict, ranks: Ranks) -> Iterator[None]:
    kept = {key: weights.clone() for key, (weights, _) in groups.items()}
    for key, (weights, bases) in groups.items():
        for weight, basis, rank in zip(weights, bases, ranks[key]):
            if rank != DENSE:
                weight.copy_(basis[:, :rank] @ (basis[:, :rank].T @ weight))
    try:
        yield
    finally:
        for key, (weights, _) in groups.items():
            weights.copy_(kept[key])


def _loss(streamed: StreamedModel, hidden: Batches) -> float:
    """Mean loss on the next token, over all windows of the walk."""
    total, count = 0.0, 0
    for states, batch in zip(hidden, streamed.batches):
        logits = streamed.head(states, batch)[:, :-1].float()
        total += float(F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").double())
        count += batch[:, 1:].numel()
    return total / count
