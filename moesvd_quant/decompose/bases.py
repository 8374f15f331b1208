"""Bases of D2-MoE that are not weighted means: RegMean and TIES, as its public code has them."""

from collections.abc import Sequence

import torch

OFF_DIAGONAL = 0.5  # what RegMean leaves of the correlations of inputs
TRIMMED = 0.2  # share of an expert's changes that TIES keeps, the largest


def regmean(weights: Sequence[torch.Tensor], grams: Sequence[torch.Tensor]) -> torch.Tensor:
    """Base (out, in) float64 whose outputs are nearest to those of all experts on their own inputs, in closed form:
    (sum W_e G_e) (sum G_e)^-1 (Jin et al. 2023), with G_e's off-diagonal elements halved.

    weights (E, out, in), grams (in, in) of each. Inputs that no expert got have the plain mean of the weights.
    """
    mean = sum(weight.double() for weight in weights) / len(weights)
    cross, total = torch.zeros_like(mean), torch.zeros(mean.shape[1], mean.shape[1]).to(mean)
    for weight, gram in zip(weights, grams):
        damped = OFF_DIAGONAL * gram.double()
        damped.diagonal().copy_(gram.double().diagonal())
        cross += (weight.double() - mean) @ damped
        total += damped
    return mean + cross @ torch.linalg.pinv(total, hermitian=True, rtol=1e-12)


def ties(weights: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Base (out, in) float64: the most used expert plus what the others agree on (Yadav et al. 2023).

    weights (E, out, in), tokens (E,). Of each other expert's difference to the most used one the largest fifth is kept;
    each element's sign is that of the sum of what is left; the largest of the differences of that sign is added, as the
    public code of D2-MoE does (TIES itself takes their mean).
    """
    first = int(tokens.argmax())
    most = weights[first].double()
    total, high, low = torch.zeros_like(most), torch.zeros_like(most), torch.zeros_like(most)
    for expert, weight in enumerate(weights):
        if expert == first:
            continue
        change = weight.double() - most
        dropped = change.numel() - max(1, int(TRIMMED * change.numel()))
        edge = change.abs().flatten().kthvalue(max(1, dropped)).values
        change = torch.where(change.abs() > edge, change, 0.0)
        total += change
        high, low = torch.maximum(high, change), torch.minimum(low, change)
    return most + torch.where(total > 0, high, torch.where(total < 0, low, 0.0))
