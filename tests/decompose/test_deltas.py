"""D2-MoE's base and deltas against the formulas written out."""

import torch

from moesvd_quant.decompose.deltas import merge_base, share_deltas, shared_right
from moesvd_quant.decompose.whitening import whitened_error


def problem(experts=3, shape=(10, 16)):
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(experts, *shape, generator=generator, dtype=torch.float64)
    x = torch.randn(experts, 200, shape[1], generator=generator, dtype=torch.float64)
    x = x @ torch.randn(experts, shape[1], shape[1], generator=generator, dtype=torch.float64)
    return weights, x.mT @ x


def test_base_is_the_elementwise_weighted_mean():
    weights, _ = problem()
    fisher = torch.rand(weights.shape, dtype=torch.float64)
    fisher[:, 0, 0] = 0  # matters to no expert: the plain mean, not 0/0
    base = merge_base(weights, fisher)
    for i, j in ((1, 2), (9, 15)):
        expected = sum(fisher[e, i, j] * weights[e, i, j] for e in range(3)) / sum(fisher[e, i, j] for e in range(3))
        assert torch.isclose(base[i, j], expected)
    assert torch.isclose(base[0, 0], weights[:, 0, 0].mean())
    frequency = torch.tensor([5.0, 1.0, 0.0])
    assert torch.allclose(merge_base(weights, frequency), (5 * weights[0] + weights[1]) / 6)


def test_the_shared_right_factor_is_the_best_for_the_summed_inputs():
    weights, grams = problem()
    right = shared_right(weights, grams, 4)
    stacked, pooled = weights.flatten(0, 1), grams.sum(0)

    def loss(r):  # best left factor for the stack under the summed Gram matrix
        left = stacked @ pooled @ r.T @ torch.linalg.inv(r @ pooled @ r.T)
        return whitened_error(stacked, left @ r, pooled)

    best = loss(right)
    root = torch.linalg.cholesky(pooled)
    values = torch.linalg.svdvals(stacked @ root) ** 2
    assert abs(best - float(values[4:].sum() / values.sum())) < 1e-9  # Eckart-Young


def test_each_left_factor_is_refitted_under_its_own_inputs():
    weights, grams = problem()
    left, right = share_deltas(weights, grams, 4)
    for weight, gram, factor in zip(weights, grams, left):
        residual = (weight - factor @ right[0]) @ gram @ right[0].T
        assert residual.abs().max() < 1e-7 * gram.abs().max()
