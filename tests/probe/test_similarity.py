"""Similarities against their definitions and against matrices whose answer is known."""

import math

import pytest
import torch

from moesvd_quant.probe.similarity import deltas, effective_rank, expert_similarity, linear_cka, mean_cka, random_like


def test_effective_rank_of_equal_and_of_one_value():
    assert effective_rank(torch.full((7,), 3.0)) == pytest.approx(7)
    assert effective_rank(torch.tensor([5.0, 0.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0
    shares = [0.5, 0.25, 0.25]
    assert effective_rank(torch.tensor(shares) * 8) == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))


def test_cka_is_hsic_over_its_norms():
    """Kornblith et al., equation 3 and 4: HSIC of linear kernels, tr(KHLH), with H the centering matrix."""
    x, y = random_like((9, 4), 1).double(), random_like((9, 6), 2).double()
    y[:, :2] = x[:, :2]
    h = torch.eye(9, dtype=torch.float64) - 1 / 9

    def hsic(a, b):
        return torch.trace(a @ a.T @ h @ b @ b.T @ h)

    expected = hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt()
    assert linear_cka(x, y) == pytest.approx(float(expected), rel=1e-9)


def test_cka_knows_no_rotation_and_no_scale():
    x = random_like((20, 5)).double()
    rotation = torch.linalg.qr(random_like((5, 5), 3).double())[0]
    assert linear_cka(x, 3 * x @ rotation) == pytest.approx(1)
    assert linear_cka(x, random_like((20, 5), 4)) < 0.5
    assert mean_cka([x, x, 2 * x]) == pytest.approx(1)


def test_experts_with_one_input_space_have_like_v_and_unlike_u():
    left = torch.stack([random_like((40, 4), seed) for seed in range(3)])
    weights = left @ random_like((4, 60), 9)  # one row space for all
    found = expert_similarity(weights, 4)
    assert found["V"] == pytest.approx(1, abs=1e-6)
    assert found["U"] < 0.4


def test_deltas_of_equal_experts_vanish():
    one = random_like((6, 5))
    assert deltas(torch.stack([one, one])).abs().max() < 1e-12
