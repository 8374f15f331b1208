"""Which weights go: Wanda's choice against the paper's words, OWL's shares against its own arithmetic."""

from itertools import combinations

import numpy as np
import pytest
import torch

from moesvd_quant.decompose.sparsity import TWO_OF_FOUR, Pattern, owl_shares, wanda_kept, wanda_mask


@pytest.fixture
def layer():
    """A weight (out, in) and inputs (tokens, in), some of them much larger than others."""
    generator = torch.Generator().manual_seed(3)
    scale = torch.rand(16, generator=generator).pow(3) * 10
    return torch.randn(5, 16, generator=generator), torch.randn(40, 16, generator=generator) * scale


def kept_sum(weight, inputs, row, columns):
    """What the columns of a row put out at most, by the paper: sum of |w| times the norm of the input."""
    return sum(abs(float(weight[row, j])) * float(inputs[:, j].norm()) for j in columns)


def test_wanda_keeps_the_best_pair_of_every_four(layer):
    weight, inputs = layer
    mask = wanda_mask(weight, inputs.norm(dim=0), TWO_OF_FOUR)
    for row in range(5):
        for first in range(0, 16, 4):
            best = max(combinations(range(first, first + 4), 2), key=lambda two: kept_sum(weight, inputs, row, two))
            assert mask[row, first : first + 4].nonzero()[:, 0].tolist() == [j - first for j in best]
    assert mask.sum() == wanda_kept((5, 16), TWO_OF_FOUR) == 40


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.9])
def test_wanda_compares_within_a_row(layer, ratio):
    weight, inputs = layer
    mask = wanda_mask(weight, inputs.norm(dim=0), Pattern(ratio))
    for row in range(5):
        order = sorted(range(16), key=lambda j: kept_sum(weight, inputs, row, [j]))
        assert set((~mask[row]).nonzero()[:, 0].tolist()) == set(order[: int(16 * ratio)])
    assert mask.sum() == wanda_kept((5, 16), Pattern(ratio))


def test_of_equal_scores_the_first_goes_and_odd_sizes_are_refused():
    mask = wanda_mask(torch.ones(1, 4), torch.ones(4), TWO_OF_FOUR)
    assert mask.tolist() == [[False, False, True, True]]
    for refused in (wanda_mask, wanda_kept):
        given = ((1, 6),) if refused is wanda_kept else (torch.ones(1, 6), torch.ones(6))
        with pytest.raises(ValueError, match="6 inputs do not part into groups of 4; use pattern: unstructured"):
            refused(*given, TWO_OF_FOUR)


def test_owl_shares_are_those_of_its_code():
    scores, ratio, spread = [0.02, 0.07, 0.03, 0.05], 0.7, 0.08
    kept = np.array(scores)
    kept = (kept - kept.min()) * (1 / (kept.max() - kept.min()) * spread * 2)
    kept = kept - kept.mean() + (1 - ratio)
    assert np.allclose(owl_shares(scores, [10] * 4, 1 - ratio), kept)


def test_owl_spends_the_ratio_whatever_the_sizes_and_says_where_it_cannot():
    sizes = [10, 30, 60]
    shares = owl_shares([0.1, 0.3, 0.2], sizes, 0.5)
    assert sum(share * size for share, size in zip(shares, sizes)) == pytest.approx(50)
    assert max(shares) - min(shares) == pytest.approx(0.16)
    assert owl_shares([0.1, 0.1], [1, 2], 0.4) == [0.4, 0.4]
    with pytest.raises(ValueError, match=r"layer 2 of 2 would keep 103\.0%"):
        owl_shares([0.1, 0.3], [1, 1], 0.95)
