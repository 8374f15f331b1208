"""V sharing and U trimming against the pseudocode written out, and against what refitting must give."""

import pytest
import torch

from moesvd_quant.decompose.sharing import (
    SHARINGS,
    activation_weighted_svd,
    algorithm_3,
    equation_6,
    equation_8,
    make_positive_definite,
    refit,
    stored_factors,
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
    assert stored_factors("algorithm_3", FREQUENCY, 2) == (2, 4)


@pytest.mark.parametrize("share", SHARINGS)
@pytest.mark.parametrize("keep_u", [1, 2, 4])
def test_as_many_factors_are_counted_as_are_made(share, keep_u):
    weights, grams = experts()
    made = SHARINGS[share](weights, grams, FREQUENCY, 6, keep_u)
    assert stored_factors(share, FREQUENCY, keep_u) == (len(made.left), len(made.right))
    assert max(made.left_rows) == len(made.left) - 1 and max(made.right_rows) == len(made.right) - 1


def test_equation_8_is_the_papers_2mr_plus_rn():
    assert stored_factors("equation_8", torch.rand(8), 2) == (2, 1)
    assert stored_factors("equation_8", torch.rand(16), 4) == (4, 1)
    assert stored_factors("equation_8", torch.rand(64), 2, groups=8) == (16, 8)


@pytest.mark.parametrize("make", [equation_6, equation_8])
def test_equations_6_and_8_are_sums_over_singular_values(make):
    """Without any factorized product: sum over k of (sum over j of sigma_jk u_jk) (v_sk^T S_s^-1)."""
    weights, grams = experts()
    made = make(weights, grams, FREQUENCY, 6, 2)
    roots = [torch.linalg.cholesky(gram) for gram in grams]
    parts = [torch.linalg.svd(w @ root, full_matrices=False) for w, root in zip(weights, roots)]
    undone = parts[1][2] @ torch.linalg.inv(roots[1])  # expert 1 is the most frequent
    sources = [[0], [1], [2], [3]] if make is equation_6 else [[1, 2], [1], [1, 2], [1, 2]]
    for expert, of in enumerate(sources):
        wanted = sum(s[k] * torch.outer(u[:, k], undone[k]) for u, s, _ in (parts[j] for j in of) for k in range(6))
        got = made.left[made.left_rows[expert]] @ made.right[made.right_rows[expert]]
        assert torch.allclose(got, wanted, atol=1e-8)
    assert made.right.shape == (1, 6, 16)


def test_equation_6_is_exact_for_the_expert_that_v_comes_from():
    weights, grams = experts()
    made = equation_6(weights, grams, FREQUENCY, 12)
    products = [made.left[e] @ made.right[0] for e in range(4)]
    assert torch.allclose(products[1], weights[1], atol=1e-8)
    assert whitened_error(weights[0], products[0], grams[0]) > 0.5  # and not for others: point 9 of docs/moe-svd.md


def test_algorithm_3_is_the_pseudocode_written_out():
    weights, grams = experts()
    made = algorithm_3(weights, grams, FREQUENCY, 6, 2)
    parts = [torch.linalg.svd(w @ torch.linalg.cholesky(g), full_matrices=False) for w, g in zip(weights, grams)]
    for expert, sources in enumerate(trimmed_sources(FREQUENCY, 2)):
        u = sum(parts[j][0][:, :6] for j in sources)
        sigma = torch.diag(sum(parts[j][1][:6] for j in sources))
        v = parts[1][2][:6] @ torch.linalg.inv(torch.linalg.cholesky(grams[expert]))
        got = made.left[made.left_rows[expert]] @ made.right[made.right_rows[expert]]
        assert torch.allclose(got, u @ sigma @ v, atol=1e-8)


def test_refit_is_one_right_factor_and_the_best_left_ones():
    weights, grams = experts()
    made = refit(weights, grams, FREQUENCY, 6, 2)
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
    made = refit(weights, grams, FREQUENCY, 12, 4)
    got = made.left[made.left_rows[1]] @ made.right[0]
    assert torch.allclose(got, weights[1], atol=1e-8)
