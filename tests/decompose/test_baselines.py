"""Plain SVD and ASVD against the formulas written out, and against each other where they must agree."""

import numpy as np
import pytest
import torch

from moesvd_quant.decompose.baselines import asvd, fwsvd, plain_svd
from moesvd_quant.decompose.sharing import SHARINGS, share_in_groups
from moesvd_quant.decompose.whitening import whitened_svd


def weight(shape=(12, 20), seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_plain_svd_is_the_best_of_its_rank():
    w = weight()
    left, right = plain_svd(w, 5)
    assert left.shape == (12, 5) and right.shape == (5, 20)
    values = np.linalg.svd(w.numpy(), compute_uv=False)
    assert float(((w - left @ right) ** 2).sum()) == pytest.approx(float((values[5:] ** 2).sum()))  # Eckart-Young


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_asvd_is_the_scaled_svd_with_its_scale_undone(alpha):
    w, magnitude = weight(), torch.rand(20, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1
    scale = np.diag(magnitude.numpy() ** alpha)
    u, s, v = np.linalg.svd(w.numpy() @ scale, full_matrices=False)
    expected = (u[:, :5] * s[:5]) @ v[:5] @ np.linalg.inv(scale)
    left, right = asvd(w, magnitude, alpha, 5)
    assert np.allclose((left @ right).numpy(), expected)


def test_asvd_is_plain_svd_for_alike_inputs_and_svd_llm_for_uncorrelated_ones():
    w = weight()
    plain = torch.matmul(*plain_svd(w, 5))
    assert torch.allclose(torch.matmul(*asvd(w, torch.full((20,), 3.0), 0.5, 5)), plain)
    deviation = torch.linspace(0.5, 2, 20, dtype=torch.float64)
    whitened = torch.matmul(*whitened_svd(w, torch.diag(deviation**2), 5))
    assert torch.allclose(torch.matmul(*asvd(w, deviation, 1.0, 5)), whitened)


def test_fwsvd_loses_least_of_its_rank_in_the_weighted_norm():
    w, fisher = weight(), torch.rand(20, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.1
    left, right = fwsvd(w, fisher, 5)
    values = np.linalg.svd(w.numpy() * np.sqrt(fisher.numpy()), compute_uv=False)
    # Each squared error counts by the information of its input's weights; Eckart-Young says what is the least.
    assert float(((w - left @ right) ** 2 * fisher).sum()) == pytest.approx(float((values[5:] ** 2).sum()))
    assert torch.allclose(torch.matmul(*fwsvd(w, torch.ones(20), 5)), torch.matmul(*plain_svd(w, 5)))


def test_a_feature_that_was_never_seen_does_not_break_asvd():
    magnitude = torch.ones(20)
    magnitude[3] = 0
    assert all(torch.isfinite(side).all() for side in asvd(weight(), magnitude, 0.5, 5))
    assert torch.isfinite(asvd(weight(), torch.zeros(20), 0.5, 5)[1]).all()
    assert all(torch.isfinite(side).all() for side in fwsvd(weight(), magnitude, 5))


@pytest.mark.parametrize("make", SHARINGS.values())
def test_groups_are_each_shared_alone(make):
    weights = [weight(seed=e) for e in range(6)]
    x = torch.randn(6, 40, 20, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    grams, frequency = list(x.mT @ x), torch.tensor([0.1, 0.5, 0.3, 0.2, 0.6, 0.3])
    both = share_in_groups(make, weights, grams, frequency, 4, 2, 2)
    for start in (0, 3):
        span = slice(start, start + 3)
        alone = make(weights[span], grams[span], frequency[span], 4, 2)
        for e in range(3):
            row = start + e
            got = both.left[both.left_rows[row]] @ both.right[both.right_rows[row]]
            assert torch.allclose(got, alone.left[alone.left_rows[e]] @ alone.right[alone.right_rows[e]])
