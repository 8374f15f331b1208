"""Leaving out intermediate channels of an expert, and making up for them in down (MoE-Slimming; Nyström's refit).

h (I,) is what down (hidden, I) is given, and G = sum h hᵀ over the expert's tokens.
"""

import torch


def _damped(gram: torch.Tensor, damp: float) -> torch.Tensor:
    """G with `damp` times its mean diagonal added, float64."""
    damped = gram.to(torch.float64, copy=True)
    damped.diagonal().add_(damp * damped.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny))
    return damped


def channel_losses(down: torch.Tensor, gram: torch.Tensor, damp: float) -> torch.Tensor:
    """(I,) float64: what the output loses in squares when one channel goes and all others make up for it:
    ‖W_:j‖² / [G⁻¹]_jj (Hassibi and Stork 1992, of a column). down (hidden, I), gram (I, I)."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(_damped(gram, damp))).diagonal()
    return down.double().square().sum(0) / inverse


def refit_down(down: torch.Tensor, gram: torch.Tensor, kept: torch.Tensor, damp: float) -> torch.Tensor:
    """(hidden, k) float64 that gives on the `kept` channels (k,) int64 what down gives on all, as nearly as may be.

    The least of sum ‖W h - W' h_K‖² + λ‖W' - W_K‖², which is W_K + W_D G_DK (G_KK + λI)⁻¹, λ being `damp` times the
    mean diagonal of G: where nothing is known of the inputs, the columns stay as they are.
    """
    gone = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
    gone[kept] = False
    weight, root = down.double(), torch.linalg.cholesky(_damped(gram, damp)[kept][:, kept])
    lost = weight[:, gone] @ gram[gone][:, kept].double()
    return weight[:, kept] + torch.cholesky_solve(lost.T, root).T
