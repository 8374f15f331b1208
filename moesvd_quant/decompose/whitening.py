"""Low-rank factors that are best for the inputs a matrix really gets.

The error of W_hat is tr((W - W_hat) G (W - W_hat)^T) with G the Gram matrix of the inputs. Its minimiser of
rank r is U_r U_r^T W, with U_r the leading eigenvectors of W G W^T: the same as truncating the SVD of W S
with G = S S^T and undoing S (SVD-LLM; MoE-SVD eq. 11 and 12), without an inverse of S.
"""

from collections.abc import Sequence
from functools import reduce

import torch


def gram_root(gram: torch.Tensor) -> torch.Tensor:
    """S (n, n) float64 with S S^T = gram, by eigendecomposition (SVD-LLM V2): never fails on a singular one."""
    values, vectors = torch.linalg.eigh(gram.double())
    return vectors * values.clamp(min=0).sqrt()


def _triangular_root(gram: torch.Tensor) -> torch.Tensor | None:
    """`gram_root` by Cholesky, in a tenth of the time: lower triangular, with an inverse that can be trusted. None
    where gram is nearly singular, as no blended metric is."""
    root, failed = torch.linalg.cholesky_ex(gram.double())
    left_over = root.diagonal().square() / gram.diagonal()  # of an input's variance, when those before it are known
    return None if failed or float(left_over.min()) < 1e-6 else root


def _precise(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """All in the best of their precisions, at least float32. Gram matrices are sums in float32: products in float64
    would not be more exact, and are up to 64 times as slow on a GPU."""
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
    return tuple(tensor.to(dtype) for tensor in tensors)


def _inner(weight: torch.Tensor, gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, bool]:
    """The smaller of A A^T and A^T A, with A = weight @ root; the root where it is the latter, and whether that is
    triangular."""
    if weight.shape[0] <= weight.shape[1]:
        return weight @ gram @ weight.T, None, False
    triangular = _triangular_root(gram)
    root = gram_root(gram) if triangular is None else triangular
    half = root.to(weight.dtype)
    return half.T @ (weight.T @ weight) @ half, root, triangular is not None


def whitened_spectrum(weight: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Squared singular values (min(out, in),) float64 of weight @ gram_root(gram), largest first.

    weight (out, in), gram (in, in). The sum of the first r is the energy a rank-r factorization keeps.
    """
    inner, _, _ = _inner(*_precise(weight, gram))
    return torch.linalg.eigvalsh(inner).flip(0).clamp(min=0).double()


def whitened_directions(
    weight: torch.Tensor, gram: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`whitened_spectrum` (k,), the leading left singular vectors U_r (out, rank) of weight @ gram_root(gram), and
    U_r^T weight (rank, in), all float64, by one eigendecomposition of the smaller side, in the precision of the inputs.
    """
    weight, gram = _precise(weight, gram)
    inner, root, triangular = _inner(weight, gram)
    values, vectors = torch.linalg.eigh(inner)
    values, vectors = values.flip(0).clamp(min=0).double(), vectors.flip(1)[:, :rank]
    if root is None:
        return values, vectors.double(), (vectors.T @ weight).double()
    vectors = vectors.double()
    left = (weight @ (root @ vectors).to(weight)).double()
    if triangular:  # U_r^T W = Sigma_r V_r^T S^-1: no second product with W
        sigma = left.norm(dim=0).clamp(min=1e-300)
        undone = torch.linalg.solve_triangular(root, vectors.T, upper=False, left=False)
        return values, left / sigma, undone * sigma[:, None]
    basis = torch.linalg.qr(left)[0]  # orthogonal already, unless their values vanish beside the largest
    return values, basis, (basis.T.to(weight) @ weight).double()


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
    weight, approximation, gram = _precise(weight, approximation, gram)
    delta = weight - approximation
    energy = float(((weight @ gram) * weight).sum(dtype=torch.float64))
    return float(((delta @ gram) * delta).sum(dtype=torch.float64)) / energy if energy > 0 else 0.0
