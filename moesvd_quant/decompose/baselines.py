"""The factorizations that the papers compare with, per matrix. SVD-LLM's is `whitening.whitened_svd`."""

import torch

from .whitening import balance


def plain_svd(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """left (out, rank), right (rank, in) float64: the truncated SVD of weight (out, in), blind to its inputs."""
    u, sigma, v = torch.linalg.svd(weight.double(), full_matrices=False)
    return balance(u[:, :rank] * sigma[:rank], v[:rank])


def asvd(weight: torch.Tensor, magnitude: torch.Tensor, alpha: float, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """left (out, rank), right (rank, in) float64 of ASVD (Yuan et al. 2023): W S = U Sigma V, W = U Sigma_r V S^-1.

    S is diagonal, S_jj = (mean |x_j|)^alpha; magnitude (in,): the mean |x_j|.
    """
    return _scaled_svd(weight, _above_zero(magnitude) ** alpha, rank)


def fwsvd(weight: torch.Tensor, fisher: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """left (out, rank), right (rank, in) float64 of FWSVD (Hsu et al. 2022): W D = U Sigma V, W = U Sigma_r V D^-1.

    D is diagonal, D_jj^2 the Fisher information of all weights of input j together, fisher (in,). The paper's W is
    (in, out): what it sums is a row there and a column here.
    """
    return _scaled_svd(weight, _above_zero(fisher).sqrt(), rank)


def _above_zero(values: torch.Tensor) -> torch.Tensor:
    """float64; a value of 0 counts like the smallest above it, so that a scale of it can be undone."""
    values = values.double()
    floor = values[values > 0].min() if (values > 0).any() else torch.ones((), dtype=torch.float64)
    return values.clamp(min=floor)


def _scaled_svd(weight: torch.Tensor, scale: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    left, right = plain_svd(weight.double() * scale, rank)
    return balance(left, right / scale)
