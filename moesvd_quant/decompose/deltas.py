"""D2-MoE: one base for all experts of a projection, and a low-rank delta for each (Gu et al., ICML 2025)."""

from collections.abc import Sequence

import torch

from .whitening import gram_root, refit_left


def merge_base(weights: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """Base (out, in) float64: the mean of weights (E, out, in) weighted by importance, (E,) or of the weights' shape.

    D2-MoE eq. 3 with the diagonal Fisher information as importance, elementwise. Elements that matter to no expert get
    the plain mean.
    """
    # One expert at a time: in float64 all of them would be four layers' worth of memory.
    merged, plain, total = (torch.zeros_like(weights[0], dtype=torch.float64) for _ in range(3))
    for weight, share in zip(weights, importance):
        merged += weight.double() * share.double()
        plain += weight.double()
        total += share.double()
    merged /= total.clamp(min=torch.finfo(torch.float64).tiny)
    return torch.where(total > 0, merged, plain / len(weights))


def shared_right(deltas: Sequence[torch.Tensor], grams: Sequence[torch.Tensor], rank: int) -> torch.Tensor:
    """The right factor (rank, in) float64 that serves all deltas (out, in) best under their summed inputs.

    Leading right singular vectors of the stacked deltas, whitened by the root of the *summed* Gram matrix (the public
    code averages Cholesky factors, which is no root of anything).
    """
    root = gram_root(sum(gram.double() for gram in grams))
    product = sum(delta.double().T @ delta.double() for delta in deltas)
    directions = torch.linalg.eigh(root.T @ product @ root)[1].flip(1)[:, :rank]
    return directions.T @ torch.linalg.pinv(root, rtol=1e-7)


def share_deltas(
    deltas: Sequence[torch.Tensor], grams: Sequence[torch.Tensor], rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """left (E, out, rank), right (1, rank, in) float64: one right factor, left ones refitted to it."""
    right = shared_right(deltas, grams, rank)
    left = torch.stack([refit_left([delta], [gram], [right]) for delta, gram in zip(deltas, grams)])
    scale = (right.norm(dim=1) / left.square().sum((0, 1)).sqrt().clamp(min=1e-300)).clamp(min=1e-300).sqrt()
    return left * scale, (right / scale[:, None])[None]
