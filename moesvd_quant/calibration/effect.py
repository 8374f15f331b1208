"""How much the model's output minds an error in each group of experts, measured in one walk.

The same relative error costs far more in one layer than in another. Each group (a projection of a layer, or of a few
neighbouring ones where there are many) is rounded to PERTURBATION bits in turn, and the divergence of the model's
prediction from the original's is measured. All perturbed models go through the layers together, so that every layer is
read once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F

from ..memory.limits import Batches
from ..model.experts import find_experts, shapes_of, split_projections
from ..model.stream import StreamedModel
from ..quantize.rounding import resolve_group_size, round_to_nearest
from ..runtime.grids import Grid

PERTURBATION = 3  # bits
TOKENS, LENGTH = 4096, 256  # of calibration text
LAYERS = 16  # groups of layers at most


def settings() -> dict[str, int]:
    """What effects depend on beside model and text."""
    return {"perturbation": PERTURBATION, "tokens": TOKENS, "length": LENGTH, "layers": LAYERS}


def perturbed(weights: torch.Tensor) -> torch.Tensor:
    """Weights (..., out, in) rounded to PERTURBATION bits, in their dtype."""
    form = Grid(PERTURBATION, resolve_group_size("auto", weights.shape[-1]), sym=False)
    if weights.dim() > 2:
        return torch.stack([perturbed(w) for w in weights])
    return round_to_nearest(weights, form).dense(torch.float32).to(weights.dtype)


@contextmanager
def _rounded(weights: torch.Tensor) -> Iterator[None]:
    kept = weights.clone()
    for weight in weights:
        weight.copy_(perturbed(weight))
    try:
        yield
    finally:
        weights.copy_(kept)


def groups_of(streamed: StreamedModel) -> list[int]:
    """The group of each layer that has experts, -1 for the others: runs of neighbours of nearly equal size."""
    places = [i for i, layer in enumerate(streamed.layers) if any(True for _ in find_experts(layer))]
    groups = [-1] * len(streamed.layer_names)
    for at, index in enumerate(places):
        groups[index] = at * min(LAYERS, len(places)) // len(places)
    return groups


def copies_of(streamed: StreamedModel) -> int:
    """Hidden states at a time, at most: of each group, and those of a layer besides."""
    each = max(sum(len(shapes_of(experts)) for _, experts in find_experts(layer)) for layer in streamed.layers)
    return each * (min(LAYERS, len(streamed.layers)) + 1)


@torch.no_grad()
def measure_effects(
    streamed: StreamedModel,
    windows: torch.Tensor,
    batch_size: int = 8,
    progress: Callable[[int, int], None] = lambda done, total: None,
    scratch: Path | None = None,
) -> dict[tuple[str, str], float]:
    """{(path of the experts module, projection): nats per token of KL divergence when it is rounded}.

    windows (n, length) int64 of calibration text; the first TOKENS tokens of it in windows of at most LENGTH are used.
    In a model of more than LAYERS layers neighbours are rounded together and share the divergence evenly: time and
    memory grow with the layers, not with their square. scratch: folder for hidden states, memory where it is None.
    """
    windows = windows[:, :LENGTH]
    windows = windows[: max(1, TOKENS // windows.shape[1])]
    groups = groups_of(streamed)
    variants: dict[tuple[int, str, str], Batches] = {}
    members: dict[tuple[int, str, str], list[str]] = {}
    for visit in streamed.walk(windows, batch_size, scratch):
        here = {}
        for path, experts in find_experts(visit.layer):
            for projection, weights in split_projections(experts).items():
                key = groups[visit.index], path, projection
                members.setdefault(key, []).append(f"{streamed.layer_names[visit.index]}.{path}")
                with _rounded(weights):
                    here[key] = visit.run(variants.get(key, visit.hidden))
        for key in variants.keys() - here.keys():
            variants[key] = visit.run(variants[key])
        variants |= here
        progress(visit.index + 1, len(streamed.layer_names))
    found: dict[tuple[str, str], float] = {}
    with streamed.output():
        for key, hidden in variants.items():
            value = _divergence(streamed, hidden) / len(members[key])
            found |= {(path, key[2]): value for path in members[key]}
    return found


def _divergence(streamed: StreamedModel, hidden: Batches) -> float:
    """KL divergence per token of the predictions from `hidden` from those of the walk's own last hidden states."""
    total, count = 0.0, 0
    for original, other, batch in zip(streamed.hidden, hidden, streamed.batches):
        for at in streamed.predicted(batch):
            p, q = (streamed.head(h[:, at], batch[:, at]).float().log_softmax(-1) for h in (original, other))
            total += float(F.kl_div(q, p, reduction="sum", log_target=True))
        count += batch.numel()
    return total / count
