"""Pruning of the base against the formulas written out, and the accounting against published figures."""

import numpy as np
import pytest
import torch

from moesvd_quant.decompose.pruning import (
    base_parameters,
    channel_scores,
    delta_rank,
    delta_ratio,
    kept_channels,
    kept_counts,
    output_energy,
    token_choice,
)

DOWN = torch.randn(6, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
ENERGY = torch.rand(10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_scores_are_the_norm_of_energy_times_squared_columns():
    down, energy = DOWN.numpy(), ENERGY.numpy()
    expected = [np.linalg.norm(energy[k] * down[:, k] ** 2) for k in range(10)]
    scores = channel_scores(ENERGY, DOWN)
    assert np.allclose(scores.numpy(), expected)
    assert kept_channels(scores, 4).tolist() == sorted(np.argsort(expected)[-4:])


def test_output_energy_is_the_mean_square_of_the_outputs():
    x = torch.randn(200, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert torch.allclose(output_energy(weight, x.T @ x, 200), (x @ weight.T).square().mean(0))


@pytest.mark.parametrize(
    "static,dynamic,expected",
    [(0.05, 0.05, (13616, 12902)), (0.3, 0.3, (10032, 5734)), (0, 0.5, (14336, 7168)), (0.25, 0, (10752, 10752))],
)
def test_kept_counts_of_mixtral(static, dynamic, expected):
    assert kept_counts(14336, static, dynamic) == expected


def test_a_tokens_choice_blends_two_shares_of_a_whole():
    kept = torch.tensor([1, 4, 5, 8])
    prior, weight = token_choice(channel_scores(ENERGY, DOWN)[kept], DOWN[:, kept], ENERGY[kept])
    assert float(prior.sum()) == pytest.approx(1)  # half calibrated, half the token's own, whose shares add up to 1
    expected = [float(ENERGY[k] * (DOWN[:, k] ** 4).sum() ** 0.5) for k in kept]
    assert weight.tolist() == pytest.approx(expected)


# Mixtral-8x7B: 32 layers of 8 experts, 14336 x 4096; all but its experts 1.6056 billion parameters.
HIDDEN, INNER, LAYERS, EXPERTS = 4096, 14336, 32, 8
BASE, UNIT, FIXED = LAYERS * 3 * HIDDEN * INNER, LAYERS * EXPERTS * 3 * (HIDDEN + INNER), 1.6056e9


@pytest.mark.parametrize(
    "removed,pruned,expected",
    [
        (0.2, 0.0, 0.668), (0.4, 0.0, 0.461), (0.6, 0.0, 0.254),
        # Table 12: performance, 10 % of the base, and throughput, 60 %, at 20, 40, 60, 70 and 80 %
        (0.2, 0.1, 0.6805), (0.4, 0.1, 0.4734), (0.6, 0.1, 0.2662), (0.7, 0.1, 0.1626), (0.8, 0.1, 0.0593),
        (0.2, 0.6, 0.7430), (0.4, 0.6, 0.5358), (0.6, 0.6, 0.3286), (0.7, 0.6, 0.2254), (0.8, 0.6, 0.1218),
    ],
)  # fmt: skip
def test_the_delta_ratio_of_mixtral_is_the_published_one(removed, pruned, expected):
    assert pytest.approx(5.6371e9, rel=1e-4) == BASE and pytest.approx(0.0141558e9, rel=1e-4) == UNIT
    total = FIXED + EXPERTS * BASE
    rank = delta_rank(total * (1 - removed), FIXED, BASE, pruned, UNIT)
    assert delta_ratio(rank, (INNER, HIDDEN)) == pytest.approx(expected, abs=4e-4)


def test_base_parameters():
    shapes = [(14336, 4096), (14336, 4096), (4096, 14336)]
    assert base_parameters(shapes, 14336, 7168) * 2 * LAYERS == BASE
