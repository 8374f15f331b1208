"""Ranks against the budget they have to spend, and against the best of all that could be chosen."""

import itertools

import pytest

from moesvd_quant.decompose.ranks import STEP, importance_ranks, level_ranks


def test_the_budget_is_spent_evenly():
    costs, full = [100, 100, 300], [256, 256, 128]
    ranks = level_ranks(costs, full, budget=60_000)
    assert all(rank % STEP == 0 for rank in ranks)
    spent = sum(c * r for c, r in zip(costs, ranks))
    assert 60_000 - 100 * STEP < spent <= 60_000
    assert abs(ranks[0] - ranks[1]) <= STEP and abs(ranks[0] / 256 - ranks[2] / 128) < 0.15


@pytest.mark.parametrize("budget", range(30_000, 34_000, 700))
def test_items_of_different_cost_come_closer_than_any_even_share(budget):
    costs, full = [256, 256, 224], [64, 64, 64]  # gate, up and down of one tiny layer
    spent = sum(c * r for c, r in zip(costs, level_ranks(costs, full, budget)))
    around = [range(s - 3 * STEP, s + 4 * STEP, STEP) for s in [budget // sum(costs) // STEP * STEP] * 3]
    within = [r for r in itertools.product(*around) if sum(c * x for c, x in zip(costs, r)) <= budget]
    best = max(sum(c * x for c, x in zip(costs, r)) for r in within if max(r) <= 64)
    assert budget - spent <= budget - best + 256 * STEP // 4  # the exchange is of two steps at most


def test_too_little_is_no_rank_and_too_much_is_the_full_rank():
    assert level_ranks([10, 10], [32, 16], 0) == [0, 0]
    assert level_ranks([10, 10], [32, 16], 10**6) == [32, 16]


def test_ranks_are_proportional_to_the_power_of_the_importance():
    importance, costs, full = [16.0, 4.0, 1.0, 1.0], [448] * 4, [1000] * 4
    ranks = importance_ranks(importance, 0.5, costs, full, 448 * 1600)
    assert ranks == [800, 400, 200, 200]  # as 4 to 2 to 1 to 1
    assert importance_ranks(importance, 1.0, costs, full, 448 * 1100)[:2] == [800, 200]
    some = importance_ranks(importance, 0.5, costs, [504] * 4, 448 * 1100)
    assert some[0] == 504 and 448 * (1100 - STEP) < 448 * sum(some) <= 448 * 1100  # what it cannot use others get
    assert importance_ranks([0.0, 0.0], 0.5, [10, 10], [64, 64], 10 * 80) == [40, 40]
    assert importance_ranks([1.0, 0.0], 0.5, [10, 10], [64, 64], 10 * 72) == [64, 8]
    with pytest.raises(ValueError, match="less than rank 8 for each of 2"):
        importance_ranks([1.0, 1.0], 0.5, [10, 10], [64, 64], 150)
