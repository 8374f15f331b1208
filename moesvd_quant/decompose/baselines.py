"""The factorizations that the papers compare with, per matrix. SVD-LLM's is `whitening.whitened_svd`."""

import torch

from .whitening import balance


def plain_svd(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """left (out, rank), right (rank, in) float64: the truncated SVD of weight (out, in), blind to its inputs."""
    u, sigma, v = torch.linalg.svd(weight.double(), full_matrices=False)
    return balance(u[:, :rank] * sigma[:rank], v[:rank])


def asvd(weight: torch.Tensor, magnitude: torch.Tensor, alpha: float, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """left (out, rank), right (rank, in) float64 of ASVD (Yuan et al. 2023): W S = U Sigma V, W = U Sigma_r V S^-1.

    S is diagonal, S_jj = (mean |x_j|)^alpha; magnitude (in,): the mean |x_j|. A feature that was always 0 counts like
    the smallest that was not, so that S can be undone.
    """
    seen = magnitude.double()
    floor = seen[seen > 0].min() if (seen > 0).any() else torch.tensor(1.0, dtype=torch.float64)
    scale = seen.clamp(min=floor) ** alpha
    left, right = plain_svd(weight.double() * scale, rank)
    return balance(left, right / scale)
