"""Each formula of the layer sensitivity, computed another way; the choice of layers against trying all."""

import numpy as np
import pytest
import torch

from moesvd_quant.decompose.sensitivity import (
    choose_projections,
    layer_sensitivity,
    outlier_distribution,
    principal_rank,
    sampling_frequency,
)


def test_principal_rank_counts_singular_values_above_the_threshold():
    basis, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    weight = basis * torch.tensor([100.0, 10.0, 1.01, 0.99, 0.1, 0.0], dtype=torch.float64) @ basis.T
    assert principal_rank(weight, 0.01) == 3
    assert principal_rank(weight, 1e-6) == 5


def test_frequency_and_sensitivity():
    frequency = sampling_frequency(torch.tensor([30, 10, 0]), 20)
    assert frequency.tolist() == [1.5, 0.5, 0.0]
    rank, outliers = torch.tensor([4.0, 3.0, 9.0]), torch.tensor([0.1, 0.2, 0.5])
    assert layer_sensitivity([frequency, rank, outliers]) == pytest.approx(1.5 * 4 * 0.1 + 0.5 * 3 * 0.2)
    assert layer_sensitivity([rank]) == 16
    assert layer_sensitivity([frequency, rank]) == pytest.approx(1.5 * 4 + 0.5 * 3)


def test_owl_is_the_share_of_outlying_scores_of_the_whole_layer():
    draw = np.random.default_rng(0)
    weights = [draw.standard_normal((5, 8)), draw.standard_normal((7, 3)) ** 3]
    inputs = [draw.standard_normal((20, 8)) * draw.uniform(0.1, 3, 8), draw.standard_normal((9, 3))]
    scores = np.concatenate([
        np.array([[abs(w[i, j]) * np.linalg.norm(x[:, j]) for j in range(w.shape[1])] for i in range(len(w))]).ravel()
        for w, x in zip(weights, inputs)
    ])  # fmt: skip
    expected = (scores > 2 * scores.mean()).mean()
    norms = [torch.from_numpy(np.linalg.norm(x, axis=0)) for x in inputs]
    assert 0 < expected < 0.5
    assert outlier_distribution([torch.from_numpy(w) for w in weights], norms, 2.0) == pytest.approx(expected)


# Four layers of three projections of 100 parameters, each 20 at its full rank: whole layers remove 240 to 297.
DENSE, FULL = [[100] * 3] * 4, [[20] * 3] * 4
SCORES = [5.0, 1.0, 3.0, 2.0]


def layers_of(chosen):
    return [sorted(p for layer, p in chosen if layer == wanted) for wanted in range(4)]


def test_the_least_sensitive_layers_are_taken_as_few_as_reach_the_ratio_at_half_the_full_rank():
    whole = [0, 1, 2]
    assert layers_of(choose_projections(SCORES, DENSE, FULL, 250, 0.05)) == [[], whole, [], []]
    assert layers_of(choose_projections(SCORES, DENSE, FULL, 500, 0.05)) == [[], whole, [], whole]
    assert layers_of(choose_projections(SCORES, DENSE, FULL, 1000, 0.05)) == [whole] * 4
    # 280 is beyond half the full rank of one layer, and less than two remove at full rank
    assert layers_of(choose_projections(SCORES, DENSE, FULL, 280, 0.05)) == [[], whole, [], []]


def test_where_no_whole_layers_fit_the_last_one_gives_some_of_its_projections():
    assert layers_of(choose_projections(SCORES, DENSE, FULL, 350, 0.05)) == [[], [0, 1, 2], [], [0]]
    assert layers_of(choose_projections(SCORES, DENSE, FULL, 90, 0.05)) == [[], [0], [], []]


def test_what_is_chosen_can_remove_exactly_that_much():
    met = 0
    for removed in range(80, 1150, 7):
        possible = [m for m in range(1, 13) if 0.05 * 20 * m <= 100 * m - removed <= 20 * m]
        if possible:
            met += 1
            assert len(choose_projections(SCORES, DENSE, FULL, removed, 0.05)) in possible
        else:
            with pytest.raises(ValueError):
                choose_projections(SCORES, DENSE, FULL, removed, 0.05)
    assert met > 120


def test_what_cannot_be_removed_is_said_with_what_can():
    with pytest.raises(ValueError, match=r"^0\.083 and 0\.133$"):  # one projection without rank, two at full rank
        choose_projections(SCORES, DENSE, FULL, 120, 0.05)


def test_equal_scores_are_ties_whatever_their_rounding():
    assert layers_of(choose_projections([2.0 + 4e-16, 2.0, 3.0, 3.0], DENSE, FULL, 250, 0.05))[0] == [0, 1, 2]
