"""Low-rank factors that are best for the inputs a matrix really gets.

The error of W_hat is tr((W - W_hat) G (W - W_hat)^T) with G the Gram matrix of the inputs. Its minimiser of
rank r is U_r U_r^T W, with U_r the leading eigenvectors of W G W^T: the same as truncating the SVD of W S
with G = S S^T and undoing S (SVD-LLM; MoE-SVD eq. 11 and 12), without an inverse of S.
"""

from collections.abc import Sequence

import torch


def gram_root(gram: torch.Tensor) -> torch.Tensor:
    """S (n, n) float64 with S S^T = gram, by eigendecomposition (SVD-LLM V2): never fails on a singular one."""
    values, vectors = torch.linalg.eigh(gram.double())
    return vectors * values.clamp(min=0).sqrt()


def fast_root(gram: torch.Tensor) -> torch.Tensor:
    """`gram_root` by Cholesky where gram is positive definite, as every blended metric is: a tenth of the time."""
    root, failed = torch.linalg.cholesky_ex(gram.double())
    return gram_root(gram) if failed else root


def _inner(weight: torch.Tensor, gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The smaller of A A^T and A^T A, with A = weight @ root; and the root where it is the latter."""
    if weight.shape[0] <= weight.shape[1]:
        return weight @ gram @ weight.T, None
    root = fast_root(gram)
    return root.T @ (weight.T @ weight) @ root, root


def whitened_spectrum(weight: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Squared singular values (min(out, in),) float64 of weight @ gram_root(gram), largest first.

    weight (out, in), gram (in, in). The sum of the first r is the energy a rank-r factorization keeps.
    """
    inner, _ = _inner(weight.double(), gram.double())
    return torch.linalg.eigvalsh(inner).flip(0).clamp(min=0)


def whitened_directions(
    weight: torch.Tensor, gram: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`whitened_spectrum` (k,), the leading left singular vectors U_r (out, rank) of weight @ gram_root(gram), and
    U_r^T weight (rank, in), all float64, by one eigendecomposition of the smaller side.
    """
    weight, gram = weight.double(), gram.double()
    inner, root = _inner(weight, gram)
    values, vectors = torch.linalg.eigh(inner)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)[:, :rank]
    if root is None:
        return values, vectors, vectors.T @ weight
    # Orthogonal already, unless their values vanish beside the largest.
    basis = torch.linalg.qr(weight @ (root @ vectors))[0]
    return values, basis, basis.T @ weight


def whitened_svd(weight: torch.Tensor, gram: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """left (out, rank), right (rank, in) float64: the best rank-r factors under gram, directions balanced."""
    return balance(*whitened_directions(weight, gram, rank)[1:])


def balance(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product with equal norms of each left column and right row: a gauge kind to quantization."""
    scale = (right.norm(dim=1) / left.norm(dim=0).clamp(min=1e-300)).clamp(min=1e-300).sqrt()
    return left * scale, right / scale[:, None]


def refit_left(
    weights: Sequence[torch.Tensor], grams: Sequence[torch.Tensor], rights: Sequence[torch.Tensor]
) -> torch.Tensor:
    """The left factor (out, rank) float64 that minimises the summed error of experts that share it.

    left = (sum_e W_e G_e R_e^T) (sum_e R_e G_e R_e^T)^+, for given right factors R_e (rank, in).
    """
    cross: torch.Tensor | float = 0.0
    inner: torch.Tensor | float = 0.0
    for weight, gram, right in zip(weights, grams, rights):
        projected = gram.double() @ right.double().T
        cross, inner = cross + weight.double() @ projected, inner + right.double() @ projected
    return cross @ torch.linalg.pinv(inner, hermitian=True, rtol=1e-12)


@torch.no_grad()
def whitened_error(weight: torch.Tensor, approximation: torch.Tensor, gram: torch.Tensor) -> float:
    """tr((W - W_hat) G (W - W_hat)^T) / tr(W G W^T), 0 where the matrix has no energy under gram."""
    weight, gram = weight.double(), gram.double()
    delta = weight - approximation.double()
    energy = float(((weight @ gram) * weight).sum())
    return float(((delta @ gram) * delta).sum()) / energy if energy > 0 else 0.0
