"""How later inputs take up the rounding error of earlier ones: all that GPTQ needs to know of a matrix' inputs."""

from typing import NamedTuple

import torch

from .codec import QuantizeError


class HessianFactor(NamedTuple):
    """A factor of a damped Gram matrix (the Hessian of a layer's squared error), as GPTQ's feedback uses it.

    order (n,) int64: the inputs in the order they are quantized, the most active first. upper (n, n) float32, ones on
    the diagonal: the share of the rounding error of input order[i] that is added to input order[j], i < j, before that
    one is rounded. conditional_variance (n,) float64: what the function of that name gives.

    With H the damped Gram matrix in that order, H = upper diag(conditional_variance) upper^T. GPTQ's inverse Cholesky
    factor gives the same feedback (QuIP, Chee et al. 2023, theorem 6); this way nothing is inverted.
    """

    order: torch.Tensor
    upper: torch.Tensor
    conditional_variance: torch.Tensor

    @classmethod
    def of(cls, gram: torch.Tensor, damp: float, together: int = 1) -> "HessianFactor":
        """gram (n, n): of the inputs; damp: share of the mean diagonal that is added; together: so many neighbouring
        inputs follow each other in the order. QuantizeError where the damped matrix is not positive definite."""
        order, root, _ = _root(gram, damp, together)
        diagonal = root.diagonal()
        variance = _placed(diagonal, order)
        return cls(order.flip(0), root.div_(diagonal.clone()).flip(0, 1).float(), variance)

    @classmethod
    def in_place(cls, gram: torch.Tensor, damp: float) -> "HessianFactor":
        """The same with the inputs in their own order."""
        return cls.of(gram, damp, together=len(gram))


def conditional_variance(gram: torch.Tensor, damp: float) -> torch.Tensor:
    """(n,) float64: the variance of each input that those quantized after it do not explain; gram (n, n), positive.

    damp: share of the mean diagonal that is added, as GPTQ does.
    """
    order, root, mean = _root(gram, damp)
    return _placed(root.diagonal(), order) * mean


def _least_active_first(activity: torch.Tensor, together: int) -> torch.Tensor:
    """Order of inputs (n,) by their activity (n,), or by the mean of each group of neighbours; groups backwards."""
    if together == 1:
        return activity.argsort(stable=True)
    group = torch.arange(len(activity), device=activity.device) // together
    sums = torch.zeros_like(activity).index_add_(0, group, activity)
    means = sums / torch.bincount(group, minlength=len(sums)).clamp(min=1)
    return len(activity) - 1 - means[group].flip(0).argsort(stable=True)


def _root(gram: torch.Tensor, damp: float, together: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The order with what is quantized last first, the lower Cholesky factor in that order, and the mean diagonal of
    gram, by which it is divided: far from under- and overflow."""
    mean = gram.diagonal().mean(dtype=torch.float64)
    if not torch.isfinite(mean) or mean <= 0:
        raise QuantizeError("the Gram matrix of the inputs is zero or not finite")
    order = _least_active_first(gram.diagonal(), together)
    for dtype in (torch.promote_types(gram.dtype, torch.float32), torch.float64):
        hessian = gram[order][:, order].to(dtype).div_(mean.to(dtype))
        hessian.diagonal().add_(damp)
        if cholesky_in_place(hessian):
            return order, hessian, mean
    raise QuantizeError(f"the Gram matrix of the inputs with damp {damp} is not positive definite; give a larger damp")


def cholesky_in_place(matrix: torch.Tensor, size: int = 256) -> bool:
    """Puts the lower Cholesky factor of a symmetric matrix (n, n) in its place, by blocks of `size` columns: twice as
    fast as LAPACK's of n = 2048, since nearly all of it is products. Whether the matrix is positive definite."""
    for first in range(0, len(matrix), size):
        here, below = slice(first, first + size), slice(first + size, None)
        done = matrix[first:, :first]
        matrix[first:, here].addmm_(done, done[:size].T, alpha=-1)
        root, failed = torch.linalg.cholesky_ex(matrix[here, here])
        if failed:
            return False
        matrix[here, here] = root
        if first + size < len(matrix):
            matrix[below, here] = torch.linalg.solve_triangular(root.T, matrix[below, here], upper=True, left=False)
            matrix[here, below] = 0
    return True


def _placed(diagonal: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    left_over = diagonal.double().square()
    return torch.empty_like(left_over).index_copy_(0, order, left_over)
