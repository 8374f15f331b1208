"""The whitened factorization against the SVD it stands for, and against what any other choice gives."""

import pytest
import torch

from moesvd_quant.decompose.whitening import (
    balance,
    gram_root,
    refit_left,
    whitened_directions,
    whitened_error,
    whitened_spectrum,
    whitened_svd,
)

SHAPES = [(24, 40), (40, 24), (32, 32)]


def problem(shape, tokens=300, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    mix = torch.randn(shape[1], shape[1], generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, shape[1], generator=generator, dtype=torch.float64) @ mix
    return weight, x.T @ x, x


@pytest.mark.parametrize("shape", SHAPES)
def test_truncating_the_svd_of_w_times_cholesky_and_undoing_it_is_the_same(shape):
    weight, gram, _ = problem(shape)
    root = torch.linalg.cholesky(gram)  # SVD-LLM, MoE-SVD eq. 11 and 12
    u, s, v = torch.linalg.svd(weight @ root, full_matrices=False)
    expected = (u[:, :8] * s[:8]) @ torch.linalg.solve_triangular(root, v[:8], upper=False, left=False)
    left, right = whitened_svd(weight, gram, 8)
    assert torch.allclose(left @ right, expected, atol=1e-8)
    assert torch.allclose(whitened_spectrum(weight, gram), s**2, rtol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_is_that_of_the_outputs_and_the_energy_not_kept(shape):
    weight, gram, x = problem(shape)
    left, right = whitened_svd(weight, gram, 8)
    output_error = ((x @ (weight - left @ right).T) ** 2).sum() / ((x @ weight.T) ** 2).sum()
    assert whitened_error(weight, left @ right, gram) == pytest.approx(float(output_error))
    spectrum = whitened_spectrum(weight, gram)
    assert float(output_error) == pytest.approx(float(spectrum[8:].sum() / spectrum.sum()))


def test_full_rank_is_the_matrix():
    weight, gram, _ = problem((24, 40))
    left, right = whitened_svd(weight, gram, 24)
    assert torch.allclose(left @ right, weight, atol=1e-10)


def test_a_singular_gram_matrix_is_no_trouble():
    weight, gram, _ = problem((40, 24), tokens=5)
    left, right = whitened_svd(weight, gram, 8)
    assert whitened_error(weight, left @ right, gram) < 1e-10  # five inputs need five directions
    root = gram_root(gram)
    assert torch.allclose(root @ root.T, gram, atol=1e-8 * float(gram.abs().max()))


def test_no_rank_r_matrix_is_better():
    weight, gram, _ = problem((24, 40))
    best = whitened_error(weight, torch.linalg.multi_dot(whitened_svd(weight, gram, 8)), gram)
    u, s, v = torch.linalg.svd(weight)
    assert best < whitened_error(weight, (u[:, :8] * s[:8]) @ v[:8], gram)  # the plain SVD
    left, right = whitened_svd(weight, gram, 8)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        near = left + 1e-3 * torch.randn(left.shape, generator=generator, dtype=torch.float64)
        assert whitened_error(weight, near @ right, gram) > best


def test_refit_is_least_squares_over_all_tokens_of_all_experts():
    problems = [problem((12, 16), tokens=60, seed=seed) for seed in range(3)]
    rights = [torch.randn(5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    got = refit_left([p[0] for p in problems], [p[1] for p in problems], rights)
    inputs = torch.cat([x @ right.T for (_, _, x), right in zip(problems, rights)])
    outputs = torch.cat([x @ weight.T for weight, _, x in problems])
    assert torch.allclose(got, torch.linalg.lstsq(inputs, outputs).solution.T, atol=1e-8)


def test_balance_keeps_the_product_and_levels_the_norms():
    weight, gram, _ = problem((24, 40))
    left, right = whitened_svd(weight, gram, 8)
    a, b = balance(3 * left, right / 3)
    assert torch.allclose(a @ b, left @ right)
    assert torch.allclose(a.norm(dim=0), b.norm(dim=1))


@pytest.mark.parametrize("shape", SHAPES)
def test_one_decomposition_gives_what_the_svd_gives(shape):
    weight, gram, _ = problem(shape)
    u, s, _ = torch.linalg.svd(weight @ torch.linalg.cholesky(gram), full_matrices=False)
    spectrum, basis, rows = whitened_directions(weight, gram, 8)
    assert torch.allclose(spectrum, s**2, rtol=1e-8)
    assert torch.allclose((basis * u[:, :8]).sum(0).abs(), torch.ones(8, dtype=torch.float64))
    assert torch.allclose(rows, basis.T @ weight)


@pytest.mark.parametrize("shape", [(96, 160), (160, 96)])
def test_in_single_precision_nothing_that_matters_is_lost(shape):
    weight, gram, _ = problem(shape, tokens=1000)
    exact = whitened_error(weight, torch.matmul(*whitened_svd(weight, gram, 40)), gram)
    single = whitened_svd(weight.float(), gram.float(), 40)
    assert whitened_error(weight, torch.matmul(*single), gram) == pytest.approx(exact, rel=1e-5)
    full = torch.matmul(*whitened_svd(weight.float(), gram.float(), min(shape)))
    assert whitened_error(weight, full, gram) < 1e-10
    spectra = [whitened_spectrum(weight.to(kind), gram.to(kind)) for kind in (torch.float32, torch.float64)]
    assert torch.allclose(*spectra, atol=1e-6 * float(spectra[1][0]))


def test_inputs_that_nearly_repeat_others_are_no_trouble():
    """A Cholesky factor exists, but its inverse would be noise."""
    weight, _, x = problem((40, 24))
    x[:, 20] = x[:, 3] * (1 + 1e-6 * torch.randn(len(x), generator=torch.Generator().manual_seed(1)))
    gram = x.T @ x
    assert not torch.linalg.cholesky_ex(gram)[1]
    left, right = whitened_svd(weight, gram, 24)
    assert whitened_error(weight, left @ right, gram) < 1e-12
    spectrum, basis, rows = whitened_directions(weight, gram, 8)
    u, s, _ = torch.linalg.svd(weight @ gram_root(gram), full_matrices=False)
    assert torch.allclose(spectrum[:8], s[:8] ** 2, rtol=1e-8)
    assert torch.allclose((basis * u[:, :8]).sum(0).abs(), torch.ones(8, dtype=torch.float64))
    assert torch.allclose(rows, basis.T @ weight)
