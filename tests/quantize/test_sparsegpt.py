"""SparseGPT against the problem it solves, solved densely: after each input the others are the best there are."""

import pytest
import torch

from moesvd_quant.decompose.sparsity import TWO_OF_FOUR, Pattern, wanda_mask
from moesvd_quant.decompose.whitening import whitened_error
from moesvd_quant.quantize import sparsegpt as module
from moesvd_quant.quantize.feedback import HessianFactor
from moesvd_quant.quantize.sparsegpt import sparsegpt, sparsegpt_kept

DAMP = 0.01


def problem(out, columns, seed=0):
    """A weight and the Gram matrix of correlated inputs, float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    inputs = torch.randn(200, columns, generator=generator, dtype=torch.float64) @ mix
    return torch.randn(out, columns, generator=generator, dtype=torch.float64), inputs.T @ inputs


def solved_densely(weight, gram, pattern, block):
    """The same, a row at a time: what is done is fixed, and all later weights are the least squares solution beside it.
    A weight is scored by what leaving it out costs when all later ones make up for it."""
    hessian = gram + DAMP * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    out, columns = weight.shape
    made, mask = weight.clone(), torch.ones_like(weight, dtype=torch.bool)
    step = pattern.group or block
    for i in range(columns):
        if i % step == 0:
            last = min(i + step, columns)
            cost = torch.stack(
                [made[:, j] ** 2 / torch.linalg.inv(hessian[j:, j:])[0, 0] for j in range(i, last)], dim=1
            )
            if pattern.group:
                for row in range(out):
                    gone = sorted(range(last - i), key=lambda j: float(cost[row, j]))[: int(step * pattern.ratio)]
                    mask[row, [i + j for j in gone]] = False
            else:
                places = [(float(cost[row, j]), row, i + j) for row in range(out) for j in range(last - i)]
                for _, row, j in sorted(places)[: int(len(places) * pattern.ratio)]:
                    mask[row, j] = False
        for row in range(out):
            if not mask[row, i]:
                made[row, i] = 0
            # argmin over the later weights of (v - w)^T H (v - w), the earlier ones fixed
            error = made[row, : i + 1] - weight[row, : i + 1]
            later = torch.linalg.solve(hessian[i + 1 :, i + 1 :], hessian[i + 1 :, : i + 1] @ error)
            made[row, i + 1 :] = weight[row, i + 1 :] - later
    return made, mask


@pytest.mark.parametrize("pattern", [TWO_OF_FOUR, Pattern(0.5), Pattern(0.3)])
@pytest.mark.parametrize("columns", [16, 20])
def test_sparsegpt_is_the_dense_solution_step_by_step(pattern, columns, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 8)  # several blocks, the last one short
    weight, gram = problem(6, columns)
    made, mask = sparsegpt(weight, HessianFactor.in_place(gram, DAMP), pattern)
    expected, wanted = solved_densely(weight, gram, pattern, 8)
    assert torch.equal(mask, wanted)
    assert torch.allclose(made.double(), expected, atol=1e-4)
    assert not made[~mask].any() and mask.sum() == sparsegpt_kept((6, columns), pattern)


def test_it_loses_less_than_wanda_and_than_its_own_mask_without_making_up():
    weight, gram = problem(24, 64, seed=1)
    made, mask = sparsegpt(weight, HessianFactor.in_place(gram, DAMP), TWO_OF_FOUR)
    error = whitened_error(weight, made, gram)
    assert error < 0.7 * whitened_error(weight, weight * mask, gram)
    by_wanda = weight * wanda_mask(weight, gram.diagonal().sqrt(), TWO_OF_FOUR)
    assert error < 0.7 * whitened_error(weight, by_wanda, gram)
