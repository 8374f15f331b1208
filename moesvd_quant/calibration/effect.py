"""How much the model's output minds an error in each group of experts, measured in one walk.

The same relative error costs far more in one layer than in another. Each group (a projection of a layer) is rounded to
PERTURBATION bits in turn, and the divergence of the model's prediction from the original's is measured. All perturbed
models go through the layers together, so that every layer is read once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ..model.experts import find_experts, split_projections
from ..model.stream import StreamedModel
from ..quantize.gptq import resolve_group_size, round_to_nearest

PERTURBATION = 3  # bits
TOKENS, LENGTH = 4096, 256  # of calibration text


def perturbed(weights: torch.Tensor) -> torch.Tensor:
    """Weights (experts, out, in) rounded to PERTURBATION bits, in their dtype."""
    quant = {"bits": PERTURBATION, "group_size": resolve_group_size("auto", weights.shape[-1]), "sym": False}
    return torch.stack([round_to_nearest(w, quant).dense(torch.float32).to(w.dtype) for w in weights])


@contextmanager
def _rounded(experts, projection: str) -> Iterator[None]:
    weights = split_projections(experts)[projection]
    kept = weights.clone()
    weights.copy_(perturbed(weights))
    try:
        yield
    finally:
        weights.copy_(kept)


@torch.no_grad()
def measure_effects(
    streamed: StreamedModel,
    windows: torch.Tensor,
    batch_size: int = 8,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[tuple[str, str], float]:
    """{(path of the experts module, projection): nats per token of KL divergence when it is rounded}.

    windows (n, length) int64 of calibration text; the first TOKENS tokens of it in windows of at most LENGTH are used.
    """
    windows = windows[:, :LENGTH]
    windows = windows[: max(1, TOKENS // windows.shape[1])]
    variants: dict[tuple[str, str], list[torch.Tensor]] = {}
    for visit in streamed.walk(windows, batch_size):
        variants = {key: visit.run(hidden) for key, hidden in variants.items()}
        for path, experts in find_experts(visit.layer):
            for projection in split_projections(experts):
                with _rounded(experts, projection):
                    full = f"{streamed.layer_names[visit.index]}.{path}"
                    variants[full, projection] = visit.run(visit.hidden)
        progress(visit.index + 1, len(streamed.layer_names))
    return {key: _divergence(streamed, hidden) for key, hidden in variants.items()}


def _divergence(streamed: StreamedModel, hidden: list[torch.Tensor]) -> float:
    """KL divergence of the predictions from `hidden` from those of the walk's own last hidden states."""
    total, count = 0.0, 0
    for original, other, batch in zip(streamed.hidden, hidden, streamed.batches):
        p, q = (streamed.head(h, batch).float().log_softmax(-1) for h in (original, other))
        total += float((p.exp() * (p - q)).sum().double())
        count += p.shape[0] * p.shape[1]
    return total / count
