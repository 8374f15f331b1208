"""RegMean and TIES against least squares and against loops over elements."""

import torch

from moesvd_quant.decompose.bases import regmean, ties


def test_regmean_is_the_least_squares_fit_of_all_outputs():
    """With orthogonal inputs, whose Gram matrices have no off-diagonal elements, by a solver on the data themselves."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)
    inputs = [torch.diag(torch.rand(4, generator=generator, dtype=torch.float64) + 0.1) for _ in range(3)]
    data, outputs = torch.cat(inputs), torch.cat([x @ w.T for x, w in zip(inputs, weights)])
    expected = torch.linalg.lstsq(data, outputs).solution.T
    assert torch.allclose(regmean(weights, [x.T @ x for x in inputs]), expected)


def test_regmean_halves_correlations_and_keeps_the_mean_where_nothing_was_seen():
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    x = torch.randn(2, 30, 4, generator=generator, dtype=torch.float64)
    x[:, :, 3] = 0
    grams = x.mT @ x
    base = regmean(weights, grams)
    assert torch.allclose(base[:, 3], weights[:, :, 3].mean(0))
    halved = [0.5 * gram + 0.5 * torch.diag(gram.diagonal()) for gram in grams]
    normal = sum((w - base) @ gram for w, gram in zip(weights, halved))  # normal equations
    assert normal[:, :3].abs().max() < 1e-9


def test_ties_element_by_element():
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(4, 5, 6, generator=generator, dtype=torch.float64)
    base = ties(weights, torch.tensor([3, 9, 1, 2]))
    changes = {e: weights[e] - weights[1] for e in (0, 2, 3)}
    kept = {}
    for e, change in changes.items():
        largest = sorted(change.abs().flatten().tolist(), reverse=True)[:6]  # a fifth of 30
        kept[e] = [[v if abs(v) in largest else 0.0 for v in row] for row in change.tolist()]
    for i in range(5):
        for j in range(6):
            values = [kept[e][i][j] for e in kept]
            sign = (sum(values) > 0) - (sum(values) < 0)
            agreed = max((abs(v) for v in values if v * sign > 0), default=0.0) * sign
            assert torch.isclose(base[i, j], weights[1, i, j] + agreed)
