"""What GPTQ knows of its inputs, against the matrices that its paper works with."""

import pytest
import torch

from moesvd_quant.quantize.codec import QuantizeError
from moesvd_quant.quantize.feedback import HessianFactor


def gram(columns=96, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(500, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return (x.T @ x).double()


def test_it_factorizes_the_damped_gram_matrix():
    given, damp = gram(), 0.02
    order, upper, variance = HessianFactor.of(given, damp)
    expected = given / given.diagonal().mean() + damp * torch.eye(96)
    expected = expected[order][:, order]
    assert torch.equal(order, given.diagonal().argsort(descending=True))
    assert torch.allclose(upper.double() @ torch.diag(variance[order]) @ upper.double().T, expected, atol=1e-5)
    assert torch.equal(upper, upper.triu())


def test_errors_are_passed_on_as_the_inverse_cholesky_factor_of_gptq_does():
    """Frantar et al.: after input i is rounded by e, the others get -e U[i, i+1:] / U[i, i], U^T U the inverse of H.
    What all the earlier ones add up to for input j is then lost @ upper[:, j], lost = weight - rounded."""
    given = gram()
    order, upper, _ = HessianFactor.of(given, 0.02)
    damped = given + 0.02 * given.diagonal().mean() * torch.eye(96)
    inverse = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True)
    weight = torch.randn(96, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    theirs, rounded = weight.clone(), torch.zeros(96, dtype=torch.float64)
    ours = []
    for i in range(96):
        ours.append(weight[i] + (weight - rounded)[:i] @ upper[:i, i].double())
        rounded[i] = theirs[i].round()
        theirs[i + 1 :] -= (theirs[i] - rounded[i]) / inverse[i, i] * inverse[i, i + 1 :]
    assert torch.allclose(torch.stack(ours), theirs, atol=1e-5)


def test_what_cannot_be_factorized_is_an_error():
    with pytest.raises(QuantizeError, match="give a larger damp"):
        HessianFactor.of(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), 0.01)
    with pytest.raises(QuantizeError, match="zero or not finite"):
        HessianFactor.of(torch.full((2, 2), torch.nan), 0.01)
