"""Under which inputs an expert's error is judged: its own, as far as they are known, and those it may yet meet.

An expert's Gram matrix tells what calibration sent to it. Judged by that alone, whatever other text needs is
thrown away first: on text unlike the calibration, perplexity explodes (docs/results/choices.md). So three estimates are
mixed.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..memory.lazy import LazySequence
from ..runtime.routers import Sources

# Shares of the expert's own inputs, of all inputs of its layer, and of those without their correlations; together 1.
OWN, POOLED, DIAGONAL = 0.125, 0.125, 0.75
# An expert counts by its number of tokens to this power: use matters, but the seldom used must live.
FREQUENCY = 0.75
METRIC = f"{OWN}-{POOLED}-{DIAGONAL}-{FREQUENCY}"  # for names of what is kept


class Layer(NamedTuple):
    """What the experts of a layer share: Gram matrix per token (n, n), and the mean of their shrunk token counts."""

    pooled: torch.Tensor
    mean_count: torch.Tensor


def shrink(gram: torch.Tensor, count: torch.Tensor, layer: Layer) -> torch.Tensor:
    """Gram matrix (n, n) of an expert with n tokens' worth of the layer's pooled one added.

    So that an expert with few tokens (or none) is judged like its layer, and one with many hardly changes.
    The sum stays a sum: a frequent expert keeps its weight.
    """
    return gram + layer.pooled * gram.shape[-1]


def blend(gram: torch.Tensor, count: torch.Tensor, layer: Layer) -> torch.Tensor:
    """The metric (n, n) that an expert is compressed under, from its Gram matrix (a sum) and its number of tokens.

    w_e (OWN m_e + POOLED c + DIAGONAL diag(c)), with c the layer's Gram matrix per token, m_e the expert's (shrunk),
    and w_e its shrunk token count to the power FREQUENCY, over the mean.
    """
    count = (count + gram.shape[-1]).to(gram.dtype)
    mixed = OWN * shrink(gram, count, layer) / count + POOLED * layer.pooled
    mixed.diagonal().add_(DIAGONAL * layer.pooled.diagonal())
    return mixed * (count / layer.mean_count) ** FREQUENCY


def unknown(gram: torch.Tensor, count: torch.Tensor, layer: Layer) -> torch.Tensor:
    """The metric of experts that no token of the text reaches, or none but zeros: all inputs alike."""
    return torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)


class Grams(LazySequence):
    """The matrices that the experts of a layer are judged by, each made when it is asked for.

    gram (E, n, n): sums over each expert's tokens (may be mapped from a file); tokens (E,); metric: `blend`,
    `shrink` or `unknown`. ValueError where no expert saw a token, but for the last.
    """

    def __init__(
        self, gram: torch.Tensor, tokens: torch.Tensor, metric: Callable, device="cpu", sources: Sources | None = None
    ):
        """sources: the experts of the statistics that each expert here stands for; None: the same ones."""
        total = int(tokens.sum())
        if total == 0 and metric is not unknown:
            raise ValueError("no calibration token reached any expert of this layer")
        mean, pooled = (tokens + gram.shape[-1]).to(gram.dtype).mean(), gram.sum(0) / max(total, 1)
        if not pooled.count_nonzero():  # gate and up of all of them may be gone
            metric = unknown
        layer = Layer(pooled.to(device), mean.to(device))

        # No method of this object, which would then hold itself, and the layer's matrices with it.
        def made(expert: int) -> torch.Tensor:
            first, *more = sources[expert] if sources else [expert]
            own, count = gram[first].to(device), tokens[first].to(device)
            for other in more:
                own, count = own + gram[other].to(device), count + tokens[other].to(device)
            return metric(own, count, layer)

        super().__init__(len(sources or gram), made)


def coverage(tokens: torch.Tensor, features: int) -> dict[str, list[int]]:
    """Experts whose statistics are weak: {"none": at most one token, "few": fewer tokens than features}."""
    counts = tokens.tolist()
    return {
        "none": [e for e, n in enumerate(counts) if n <= 1],
        "few": [e for e, n in enumerate(counts) if 1 < n < features],
    }
