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


def _directions(weight: torch.Tensor, gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared whitened singular values (k,), largest first, and U^T W (k, in) with U the left singular vectors, both
    float64, k = min(out, in); only the smaller side is decomposed."""
    weight, gram = weight.double(), gram.double()
    if weight.shape[0] <= weight.shape[1]:
        values, u = torch.linalg.eigh(weight @ gram @ weight.T)
        return values.flip(0).clamp(min=0), u.flip(1).T @ weight
    root, product = gram_root(gram), weight.T @ weight
    values, v = torch.linalg.eigh(root.T @ product @ root)
    values, v = values.flip(0).clamp(min=0), v.flip(1)
    scale = values.clamp(min=values[0].clamp(min=1e-300) * 1e-24).sqrt()
    return values, (root @ v).T @ product / scale[:, None]


def whitened_spectrum(weight: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Squared singular values (min(out, in),) float64 of weight @ gram_root(gram), largest first.

    weight (out, in), gram (in, in). The sum of the first r is the energy a rank-r factorization keeps.
    """
    weight, gram = weight.double(), gram.double()
    if weight.shape[0] <= weight.shape[1]:
        inner = weight @ gram @ weight.T
    else:
        root = gram_root(gram)
        inner = root.T @ (weight.T @ weight) @ root
    return torch.linalg.eigvalsh(inner).flip(0).clamp(min=0)


def whitened_profile(weight: torch.Tensor, gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`whitened_spectrum`, and the norms (k,) of the rows U_i^T W of the right factor before balancing."""
    spectrum, rows = _directions(weight, gram)
    return spectrum, rows.norm(dim=1)


def output_basis(weight: torch.Tensor, gram: torch.Tensor, rank: int) -> torch.Tensor:
    """U_r (out, rank) float64, orthonormal: leading left singular vectors of weight @ gram_root(gram)."""
    weight, gram = weight.double(), gram.double()
    if weight.shape[0] <= weight.shape[1]:
        return torch.linalg.eigh(weight @ gram @ weight.T)[1].flip(1)[:, :rank].contiguous()
    root = gram_root(gram)
    v = torch.linalg.eigh(root.T @ (weight.T @ weight) @ root)[1].flip(1)[:, :rank]
    return torch.linalg.qr(weight @ (root @ v))[0]  # its columns are orthogonal already, unless their values vanish


def whitened_svd(weight: torch.Tensor, gram: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """left (out, rank), right (rank, in) float64: the best rank-r factors under gram, directions balanced."""
    basis = output_basis(weight, gram, rank)
    return balance(basis, basis.T @ weight.double())


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
