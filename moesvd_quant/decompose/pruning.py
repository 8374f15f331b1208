"""Pruning the base of D2-MoE along the intermediate dimension: static, and by each token."""

import torch

from ..recipe.stage import STEP

CALIBRATED = 0.5  # share of the calibrated score in a token's choice of channels; the rest is the token's own
ROUND = 8  # kept channels are a multiple of it


def channel_scores(energy: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Score (I,) float64 of each intermediate channel: ||c_k W_down[:, k]^2||_2 (D2-MoE, semi-dynamic pruning).

    energy: c (I,), the mean square of each channel's activation; down (hidden, I) of the base.
    """
    return energy.double() * down.double().square().norm(dim=0)


def output_energy(weight: torch.Tensor, gram: torch.Tensor, tokens: int) -> torch.Tensor:
    """Mean square (out,) float64 of weight (out, in) @ x, from the Gram matrix (in, in) of `tokens` inputs."""
    weight = weight.double()
    return ((weight @ gram.double()) * weight).sum(1).clamp(min=0) / tokens


def kept_channels(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` channels of the highest score, in ascending order, int64."""
    return torch.argsort(scores, descending=True, stable=True)[:count].sort().values


def kept_counts(channels: int, static: float, dynamic: float) -> tuple[int, int]:
    """Channels that are stored and that a token uses, of so many, where these shares are pruned."""
    stored = channels if static == 0 else max(ROUND, round(channels * (1 - static) / ROUND) * ROUND)
    return stored, min(stored, max(1, round(channels * (1 - static - dynamic))))


def token_choice(
    scores: torch.Tensor, down: torch.Tensor, up_energy: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(prior, weight), both (n,) float32: a token keeps the channels with the largest
    prior_k + weight_k a_k^2 / sum_j weight_j a_j^2, with a_k the base's activation of its gate.

    scores (n,) and down (hidden, n) are those of the kept channels; up_energy (n,): the mean square of the base's up,
    which stands in for the factor that is not known when the choice is made. The two sides are shares of a whole and
    count CALIBRATED to 1 - CALIBRATED.
    """
    prior = scores / scores.sum().clamp(min=1e-300) * CALIBRATED / (1 - CALIBRATED)
    return prior.float(), channel_scores(up_energy, down).float()


def base_parameters(projections: list[tuple[int, int]], channels: int, stored: int) -> int:
    """Parameters of the base of a layer whose matrices (out, in) keep `stored` of `channels` intermediate ones."""
    return sum(out * in_features // channels * stored for out, in_features in projections)


def delta_rank(total: float, fixed: float, base: float, pruned: float, unit: float) -> float:
    """Rank r of all deltas that gives a model `total` parameters: total = fixed + base (1 - pruned) + unit r.

    fixed: parameters outside the routed experts; base: of all whole bases; unit: of all deltas per unit of rank.
    """
    return (total - fixed - base * (1 - pruned)) / unit


def rank_of(ratio: float, shape: tuple[int, int]) -> int:
    """The rank, in steps that grouped products can take, whose `delta_ratio` is nearest to this; never above the full
    one."""
    nearest = round(ratio * shape[0] * shape[1] / sum(shape) / STEP) * STEP
    return min(nearest, min(shape))


def delta_ratio(rank: float, shape: tuple[int, int]) -> float:
    """A delta's parameters as a share of its matrix (out, in): D2-MoE's "SVD truncation threshold" (Table 12)."""
    return rank * sum(shape) / (shape[0] * shape[1])
