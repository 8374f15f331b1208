"""Under which inputs an expert's error is judged: its own, as far as they are known, and those it may yet meet.

An expert's Gram matrix tells what calibration sent to it. Judged by that alone, whatever other text needs is
thrown away first: on text unlike the calibration, perplexity explodes (docs/results.md). So three estimates are mixed.
"""

import torch

# Shares of the expert's own inputs, of all inputs of its layer, and of those without their correlations; together 1.
OWN, POOLED, DIAGONAL = 0.25, 0.25, 0.5
# An expert counts by its number of tokens to this power: use matters, but the seldom used must live.
FREQUENCY = 0.75


def shrink(gram: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Gram matrices (E, n, n) of experts, each with n tokens' worth of the layer's pooled one added.

    So that an expert with few tokens (or none) is judged like its layer, and one with many hardly changes.
    The sums stay sums: a frequent expert keeps its weight. ValueError where no expert saw a token.
    """
    return gram + _pooled(gram, tokens) * gram.shape[-1]


def blend(gram: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The metric (E, n, n) that experts are compressed under, from their Gram matrices (sums) and token counts.

    w_e (OWN m_e + POOLED c + DIAGONAL diag(c)), with c the layer's Gram matrix per token, m_e the expert's (shrunk),
    and w_e its shrunk token count to the power FREQUENCY, over the mean. ValueError where no expert saw a token.
    """
    pooled = _pooled(gram, tokens)
    counts = (tokens + gram.shape[-1]).to(gram.dtype)[:, None, None]
    mixed = OWN * shrink(gram, tokens) / counts + POOLED * pooled + DIAGONAL * torch.diag(pooled.diagonal())
    return mixed * (counts / counts.mean()) ** FREQUENCY


def _pooled(gram: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    total = int(tokens.sum())
    if total == 0:
        raise ValueError("no calibration token reached any expert of this layer")
    return gram.sum(0) / total


def coverage(tokens: torch.Tensor, features: int) -> dict[str, list[int]]:
    """Experts whose statistics are weak: {"none": at most one token, "few": fewer tokens than features}."""
    counts = tokens.tolist()
    return {
        "none": [e for e, n in enumerate(counts) if n <= 1],
        "few": [e for e, n in enumerate(counts) if 1 < n < features],
    }
