"""ASVD's search for truncation ranks against its public code's own steps."""

import pytest

from moesvd_quant.decompose.truncation import RATIOS, rank_of, search_truncation


def by_bisection(losses, whole, target):
    """The published search: all (group, ratio) by loss, the largest first; of a tail of them the start is bisected."""
    ranked = sorted(((g, k, loss) for g, own in enumerate(losses) for k, loss in enumerate(own)), key=lambda x: -x[2])
    low, high = 0, len(ranked) - 1
    while low < high:
        middle = (low + high) // 2
        ratio = dict.fromkeys(range(len(whole)), 1.0)
        for group, k, _ in ranked[middle:]:
            ratio[group] = min(ratio[group], RATIOS[k])
        if sum(ratio[g] * size for g, size in enumerate(whole)) / sum(whole) > target:
            high = middle
        else:
            low = middle + 1
    ratio = dict.fromkeys(range(len(whole)), 1.0)
    for group, k, _ in ranked[low - 1 :]:  # the last start that was small enough
        ratio[group] = min(ratio[group], RATIOS[k])
    return [ratio[g] for g in range(len(whole))]


@pytest.mark.parametrize("target", [0.3, 0.5, 0.8])
def test_it_finds_what_the_published_bisection_finds(target):
    whole = [1000, 3000, 2000]
    # Losses fall with the ratio, at another pace in each group.
    losses = [[4 + pace / (k + 1) + pace * 0.01 * k for k in range(9)] for pace in (0.3, 1.7, 0.9)]
    costs = [[int(size * ratio) for ratio in RATIOS] for size in whole]
    taken = search_truncation(losses, costs, whole, int(target * sum(whole)))
    found = [1.0 if k is None else RATIOS[k] for k in taken]
    assert found == by_bisection(losses, whole, target)
    assert sum(ratio * size for ratio, size in zip(found, whole)) <= target * sum(whole)


def test_what_cannot_be_had_is_named_and_what_is_small_enough_stays():
    with pytest.raises(ValueError, match="30 parameters remain where everything is truncated most, and 29 may"):
        search_truncation([[1.0, 2.0], [3.0, 4.0]], [[10, 50], [20, 60]], [100, 100], 29)
    assert search_truncation([[1.0]], [[10]], [100], 100) == [None]


def test_ranks_have_the_share_of_the_parameters_in_steps_of_eight():
    assert rank_of(0.5, (256, 192)) == 48  # 54.9
    assert rank_of(0.1, (64, 32)) == 8
