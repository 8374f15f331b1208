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
    """`gram_root` by Cholesky, in a tenth of the time: lower triangular, with an inverse that can be trusted; in single
    precision if that will do. None where gram is nearly singular, as no blended metric is."""
    for dtype, least in ((torch.float32, 1e-3), (torch.float64, 1e-6)):
        if torch.promote_types(gram.dtype, dtype) is dtype:
            root, failed = torch.linalg.cholesky_ex(gram.to(dtype))
            left_over = root.diagonal().square() / gram.diagonal()  # of an input's variance, given those before it
            if not failed and float(left_over.min()) > least:
                return root
    return None


def precise(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """All in the best of their precisions, at least float32. Gram matrices are sums in float32: products in float64
    would not be more exact, and are up to 64 times as slow on a GPU."""
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
    return tuple(tensor.to(dtype) for tensor in tensors)


def _product(left: torch.Tensor, right: torch.Tensor, triangular: bool = False, symmetric: bool = False):
    """left.T @ right, by blocks of rows: without the zeros above the diagonal of a lower `triangular` left, and with
    the half above the diagonal of a `symmetric` result copied from the other."""
    count = left.shape[1]
    size = max(128, count // 8)
    made = right.new_empty(count, right.shape[1])
    for first in range(0, count, size):
        rows, end = slice(first, first + size), first + size if symmetric else None
        start = first if triangular else 0
        torch.mm(left[start:, rows].T, right[start:, :end], out=made[rows, :end])
        if symmetric:
            made[:first, rows] = made[rows, :first].T
    return made


def _inner(weight: torch.Tensor, gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, bool]:
    """The smaller of A A^T and A^T A, with A = weight @ root; the root where it is the latter, and whether that is
    triangular."""
    if weight.shape[0] <= weight.shape[1]:
        return _product(weight.T, gram @ weight.T, symmetric=True), None, False
    triangular = _triangular_root(gram)
    root = gram_root(gram) if triangular is None else triangular
    half, lower = root.to(weight.dtype), triangular is not None
    once = _product(half, _product(weight, weight, symmetric=True), lower)
    return _product(half, once.T, lower, symmetric=True), root, lower


def whitened_spectrum(weight: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Squared singular values (min(out, in),) float64 of weight @ gram_root(gram), largest first.

    weight (out, in), gram (in, in). The sum of the first r is the energy a rank-r factorization keeps.
    """
    inner, _, _ = _inner(*precise(weight, gram))
    return torch.linalg.eigvalsh(inner).flip(0).clamp(min=0).double()


def whitened_directions(
    weight: torch.Tensor, gram: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`whitened_spectrum` (k,) float64, the leading left singular vectors U_r (out, rank) of weight @ gram_root(gram),
    and U_r^T weight (rank, in), both in the best of the inputs' precisions, by one eigendecomposition of the smaller
    side.
    """
    weight, gram = precise(weight, gram)
    inner, root, triangular = _inner(weight, gram)
    values, vectors = torch.linalg.eigh(inner)
    values, vectors = values.flip(0).clamp(min=0).double(), vectors.flip(1)[:, :rank]
    if root is None:
        return values, vectors, vectors.T @ weight
    vectors = vectors.to(root)
    left = weight @ (root @ vectors).to(weight)
    if triangular:  # U_r^T W = Sigma_r V_r^T S^-1: no second product with W
        sigma = left.norm(dim=0).clamp(min=1e-30)
        undone = torch.linalg.solve_triangular(root, vectors.T, upper=False, left=False)
        return values, left / sigma, undone.to(left) * sigma[:, None]
    basis = torch.linalg.qr(left.double())[0]  # orthogonal already, unless their values vanish beside the largest
    return values, basis.to(weight), basis.T.to(weight) @ weight


def whitened_svd(weight: torch.Tensor, gram: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """left (out, rank), right (rank, in): the best rank-r factors under gram, directions balanced, in the best of the
    inputs' precisions."""
    return balance(*whitened_directions(weight, gram, rank)[1:])


def balance(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product with equal norms of each left column and right row: a gauge kind to quantization."""
    scale = (right.norm(dim=1) / left.norm(dim=0).clamp(min=1e-30)).clamp(min=1e-30).sqrt()
    return left * scale, right / scale[:, None]


def refit_left(
    weights: Sequence[torch.Tensor], grams: Sequence[torch.Tensor], rights: Sequence[torch.Tensor]
) -> torch.Tensor:
    """The left factor (out, rank) float64 that minimises the summed error of experts that share it.

    left = (sum_e W_e G_e R_e^T) (sum_e R_e G_e R_e^T)^+, for given right factors R_e (rank, in).
    """
    return solved_left(*left_sums(weights, grams, rights))


def left_sums(
    weights: Sequence[torch.Tensor], grams: Sequence[torch.Tensor], rights: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of `refit_left`: sum_e W_e G_e R_e^T (out, rank), and the Gram matrix of what the left factor is given,
    sum_e R_e G_e R_e^T (rank, rank), in the best of the inputs' precisions."""
    cross: torch.Tensor | float = 0.0
    inner: torch.Tensor | float = 0.0
    for weight, gram, right in zip(weights, grams, rights):
        weight, gram, right = precise(weight, gram, right)
        projected = gram @ right.T
        cross, inner = cross + weight @ projected, inner + right @ projected
    return cross, inner


def solved_left(cross: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
    """`refit_left` from its `left_sums`; directions of `inner` that are nothing but rounding are left out."""
    noise = 1e-12 if inner.dtype == torch.float64 else 1e-6
    cross, inner = cross.double(), inner.double()
    root, failed = torch.linalg.cholesky_ex(inner)
    left_over = root.diagonal().square() / inner.diagonal()  # of an input's variance, given those before it
    if not failed and float(left_over.min()) > 1e3 * noise:
        return torch.cholesky_solve(cross.T, root).T
    return cross @ torch.linalg.pinv(inner, hermitian=True, rtol=noise)


def refit_right(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, held: float) -> torch.Tensor:
    """The right factor (rank, in) that is best beside a given left one (out, rank), under any Gram matrix.

    (L^T L + h I)^-1 (L^T W + h R), h = held times the mean diagonal of L^T L: held to the present right factor R
    (rank, in) as far as the left one may yet change by `held` of its energy.
    """
    weight, left, right = precise(weight, left, right)
    inner = left.T @ left
    weight = left.T @ weight + held * inner.diagonal().mean() * right
    inner.diagonal().add_(held * inner.diagonal().mean())
    return torch.linalg.solve(inner, weight)


@torch.no_grad()
def energy(matrix: torch.Tensor, gram: torch.Tensor) -> float:
    """tr(A G A^T), what a matrix A (out, in) puts out for inputs with Gram matrix gram (in, in), symmetric: one half of
    its blocks beside the diagonal is read and counted twice."""
    matrix, gram = precise(matrix, gram)
    size, total = max(128, len(gram) // 8), 0.0
    for first in range(0, len(gram), size):
        here = slice(first, first + size)
        put_out = matrix[:, here] @ gram[here, here]
        put_out = torch.addmm(put_out, matrix[:, :first], gram[:first, here], alpha=2)
        total += float((put_out * matrix[:, here]).sum(dtype=torch.float64))
    return total


@torch.no_grad()
def whitened_error(weight: torch.Tensor, approximation: torch.Tensor, gram: torch.Tensor) -> float:
    """`energy` of weight - approximation relative to that of weight, 0 where that has none."""
    weight, approximation = precise(weight, approximation)
    whole = energy(weight, gram)
    return energy(weight - approximation, gram) / whole if whole > 0 else 0.0
