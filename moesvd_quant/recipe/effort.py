"""How much work a stage has with a matrix, counted on its shape. Imports no torch."""

from typing import NamedTuple

# Products with a Gram matrix that a decomposition is worth, with its forecast, its errors and what is read back: fitted
# to what runs took (docs/results/compress.md).
PROFILE = 7.0


class Effort(NamedTuple):
    """Work on one matrix. products, factors: floating-point operations of products of matrices, and of Cholesky
    factors; eigen: cubed sizes of eigenvalue problems; coded: how often each weight is brought into a format."""

    products: float = 0.0
    factors: float = 0.0
    eigen: float = 0.0
    coded: float = 0.0


def judged(shape: tuple[int, int], times: float = 1.0) -> Effort:
    """Of what multiplies a matrix (out, in) with the Gram matrix of its inputs so many times: an error is one."""
    out, inputs = shape
    return Effort(products=times * 2 * out * inputs**2)


def decomposed(shape: tuple[int, int]) -> Effort:
    """Of a decomposition of a matrix (out, in) that is whitened by the Gram matrix of its inputs."""
    out, inputs = shape
    return judged(shape, PROFILE)._replace(factors=2 * inputs**3 / 3, eigen=float(min(out, inputs)) ** 3)
