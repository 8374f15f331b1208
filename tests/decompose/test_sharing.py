"""V sharing and U trimming against the pseudocode written out, and against what refitting must give."""

import pytest
import torch

from moesvd_quant.decompose.sharing import (
    activation_weighted_svd,
    left_count,
    literal,
    make_positive_definite,
    share_and_trim,
    trimmed_sources,
)
from moesvd_quant.decompose.whitening import whitened_error

FREQUENCY = torch.tensor([0.1, 0.5, 0.3, 0.2])


def experts(count=4, shape=(12, 16)):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]
    grams = []
    for _ in range(count):
        x = torch.randn(50, shape[1], generator=generator, dtype=torch.float64)
        grams.append(x.T @ x)
    return weights, grams


@pytest.mark.parametrize("values", [[-0.5, 1.0, 2.0], [0.0, 1.0, 2.0], [0.3, 1.0, 2.0]])
def test_algorithm_5_makes_any_symmetric_matrix_positive_definite(values):
    basis = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))[0]
    matrix = basis * torch.tensor(values, dtype=torch.float64) @ basis.T
    repaired = make_positive_definite(matrix + torch.triu(torch.full((3, 3), 1e-9, dtype=torch.float64), 1))
    torch.linalg.cholesky(repaired)
    if min(values) > 0:
        assert torch.allclose(repaired, matrix)  # what is well is left alone
    else:  # eigenvalues move together
        moved = torch.linalg.eigvalsh(repaired)
        assert torch.allclose(moved - moved[0], torch.tensor(values, dtype=torch.float64).sort()[0] - min(values))


def test_activation_weighted_svd_is_eq_11_and_12():
    weights, grams = experts()
    u, sigma, v, root = activation_weighted_svd(weights[0], grams[0], 12)
    assert torch.allclose(root @ root.T, grams[0])
    assert torch.allclose((u * sigma) @ v @ torch.linalg.inv(root), weights[0])


def test_sources_of_trimming_are_the_more_frequent_experts():
    # order of frequency: 1, 2, 3, 0
    assert trimmed_sources(FREQUENCY, 2) == [[1, 2], [1], [1, 2], [1, 2]]
    assert trimmed_sources(FREQUENCY, 1) == [[1], [1], [1], [1]]
    # k = 2: from the third expert on all are one function, as docs/moe-svd.md says
    assert left_count(FREQUENCY, 2, by_letter=True) == 2


def test_literal_is_algorithm_3_written_out():
    weights, grams = experts()
    made = literal(weights, grams, FREQUENCY, 6, 2)
    parts = [torch.linalg.svd(w @ torch.linalg.cholesky(g), full_matrices=False) for w, g in zip(weights, grams)]
    for expert, sources in enumerate(trimmed_sources(FREQUENCY, 2)):
        u = sum(parts[j][0][:, :6] for j in sources)
        sigma = torch.diag(sum(parts[j][1][:6] for j in sources))
        v = parts[1][2][:6] @ torch.linalg.inv(torch.linalg.cholesky(grams[expert]))
        got = made.left[made.left_rows[expert]] @ made.right[made.right_rows[expert]]
        assert torch.allclose(got, u @ sigma @ v, atol=1e-8)


def test_share_and_trim_is_one_right_factor_and_the_best_left_ones():
    weights, grams = experts()
    made = share_and_trim(weights, grams, FREQUENCY, 6, 2)
    assert made.right.shape == (1, 6, 16) and made.left.shape == (2, 12, 6)
    assert made.left_rows[1] == 0 and made.left_rows[2] == 1  # the two most frequent keep their own
    right = made.right[0]
    for expert, (weight, gram) in enumerate(zip(weights, grams)):
        errors = [whitened_error(weight, left @ right, gram) for left in made.left]
        assert made.left_rows[expert] == errors.index(min(errors))
    for row, expert in ((0, 1), (1, 2)):  # normal equations of the refit
        residual = (weights[expert] - made.left[row] @ right) @ grams[expert] @ right.T
        assert residual.abs().max() < 1e-8 * grams[expert].abs().max()


def test_all_left_factors_of_one_expert_at_full_rank_reproduce_it():
    weights, grams = experts()
    made = share_and_trim(weights, grams, FREQUENCY, 12, 4)
    got = made.left[made.left_rows[1]] @ made.right[0]
    assert torch.allclose(got, weights[1], atol=1e-8)
