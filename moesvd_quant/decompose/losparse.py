"""LoSparse (Li et al. 2023): low rank plus a rest of few rows, which lose out while both are trained."""

import math

import torch

from .baselines import plain_svd
from .ranks import STEP


def split(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """left (out, rank), right (rank, in), rest (out, in) float64, whose left @ right + rest is weight (out, in): its
    truncated SVD, each factor with the roots of the singular values, and what that leaves over."""
    left, right = plain_svd(weight, rank)
    return left, right, weight.double() - left @ right


def rank_for(shape: tuple[int, int], share: float) -> int:
    """The rank of factors of `share` of the parameters of a matrix (out, in), in whole steps, upwards as the public
    code has it; at most full."""
    out, inputs = shape
    return min(math.ceil(share * out * inputs / (out + inputs) / STEP) * STEP, out, inputs)


def kept_share(step: int, first: int, last: int, final: float) -> float:
    """The share of the rests that stays after a step: all up to step `first`, `final` after step `last`, and a cubic
    decrease between (the paper's schedule, of Zhu and Gupta 2017)."""
    if step <= first:
        return 1.0
    if step > last:
        return final
    return final + (1 - final) * (1 - (step - first) / (last - first)) ** 3


def kept_rows(importance: list[torch.Tensor], columns: list[int], share: float) -> list[torch.Tensor]:
    """Which rows stay, bool (matrices, rows) for each bank: those of the largest importance (matrices, rows) of all
    banks together, as long as they are at most `share` of all weights. columns: of the matrices of each bank."""
    scores = torch.cat([scores.flatten() for scores in importance])
    sizes = torch.cat([torch.full((len(s.flatten()),), n, device=s.device) for s, n in zip(importance, columns)])
    order = scores.argsort(descending=True, stable=True)
    fits = sizes[order].cumsum(0) <= share * int(sizes.sum())
    mask = torch.zeros_like(scores, dtype=torch.bool).index_fill(0, order[fits], True)
    parts = mask.split([scores.numel() for scores in importance])
    return [part.view_as(scores) for part, scores in zip(parts, importance)]
