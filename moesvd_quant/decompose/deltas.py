"""D2-MoE: one base for all experts of a projection, and a low-rank delta for each (Gu et al., ICML 2025)."""

import torch

from .whitening import gram_root, refit_left


def merge_base(weights: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """Base (out, in) float64: the mean of weights (E, out, in) weighted by importance, (E,) or of the weights' shape.

    D2-MoE eq. 3 with the diagonal Fisher information as importance, elementwise. Elements that matter to no expert get
    the plain mean.
    """
    importance = importance.double().reshape(len(weights), *importance.shape[1:], *([1] * (3 - importance.dim())))
    total = importance.sum(0).expand(weights.shape[1:])
    merged = (weights.double() * importance).sum(0) / total.clamp(min=torch.finfo(torch.float64).tiny)
    return torch.where(total > 0, merged, weights.double().mean(0))


def shared_right(deltas: torch.Tensor, grams: torch.Tensor, rank: int) -> torch.Tensor:
    """The right factor (rank, in) float64 that serves all deltas (E, out, in) best under their summed inputs.

    Leading right singular vectors of the stacked deltas, whitened by the root of the *summed* Gram matrix (the public
    code averages Cholesky factors, which is no root of anything).
    """
    root = gram_root(grams.double().sum(0))
    product = sum(delta.double().T @ delta.double() for delta in deltas)
    directions = torch.linalg.eigh(root.T @ product @ root)[1].flip(1)[:, :rank]
    return directions.T @ torch.linalg.pinv(root, rtol=1e-7)


def share_deltas(deltas: torch.Tensor, grams: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """left (E, out, rank), right (1, rank, in) float64: one right factor, left ones refitted to it."""
    right = shared_right(deltas, grams, rank)
    left = torch.stack([refit_left([delta], [gram], [right]) for delta, gram in zip(deltas, grams)])
    scale = (right.norm(dim=1) / left.square().sum((0, 1)).sqrt().clamp(min=1e-300)).clamp(min=1e-300).sqrt()
    return left * scale, (right / scale[:, None])[None]
