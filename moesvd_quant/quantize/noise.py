"""What quantization will cost, in closed form: no matrix has to be quantized to plan for it.

GPTQ pushes the rounding error of each input onto the inputs still to come, so that input j costs its rounding variance
times what is left of its own variance when the later ones are known: the squared diagonal of the Cholesky factor of the
Gram matrix. On trained weights the forecast is within 10 % of what GPTQ then measures (docs/results/choices.md).
"""

import torch

# Mean squared rounding error of a unit Gaussian on the best asymmetric grid of groups of 64, by bits.
ROUNDING = {2: 0.123, 3: 0.031, 4: 0.0077, 8: 3.0e-5}
# What remains of the noise of a left and of a right factor that are fitted to each other in turn (measured, to 10 %):
# the left one, which comes last, takes up what the right one lost within its rows' span.
LEFT, RIGHT = 1.07, 0.23
NOISE = f"{LEFT}-{RIGHT}"  # for names of what is kept


def dense_noise(energy: float, columns: int, innovation: float) -> float:
    """Expected tr(E G E^T) of a dense matrix with squared norm `energy`, per unit of rounding error."""
    return energy / columns * innovation


def factor_noise(spectrum: torch.Tensor, norms: torch.Tensor, columns: int, innovation: float, damp: float):
    """The same for balanced and rotated factors of rank 1 ... k, (k,) float64.

    spectrum (k,): squared whitened singular values; norms (k,): of the rows U_i^T W. The right factor's rows have
    variance sum(norms) / (rank columns) and are met by a left factor of the same energy; the left one's inputs have
    eigenvalues spectrum / norms, which a rotation levels to their geometric mean. Of the right one's noise a share of
    rank / columns lies in the span of its rows, which the left one is fitted to.
    """
    norms = norms.clamp(min=1e-30)
    rank = torch.arange(1, len(norms) + 1, dtype=torch.float64, device=norms.device)
    total = norms.cumsum(0)
    ratio = (spectrum / norms).clamp(min=1e-30)
    ratio = ratio + damp * ratio.cumsum(0) / rank
    left = total * (ratio.log().cumsum(0) / rank).exp()
    right = total.square() / (rank * columns) * innovation
    return LEFT * left + RIGHT * (1 - rank / columns).clamp(min=0) * right
