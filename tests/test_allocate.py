"""Allocation against brute force, and its promises."""

from itertools import product

import numpy as np
import pytest

from moesvd_quant.allocate import DENSE, MAX_RANKS, RANK_STEP, allocate, rank_table


def spectra(experts, size, seed, decay):
    generator = np.random.default_rng(seed)
    return generator.random((experts, 1)) * np.exp(-decay * np.arange(size)) + 1e-6


class Group:
    """Spectra and shape of the matrices of one projection of one layer."""

    def __init__(self, spectra, shape):
        self.spectra, self.shape, self.table = spectra, shape, rank_table(spectra, shape)


def ranks_of(groups, budget):
    chosen = allocate({name: group.table for name, group in groups.items()}, budget)
    return {name: [choice.rank for choice in choices] for name, choices in chosen.items()}


def cost(groups, ranks):
    return sum(
        int(np.prod(groups[name].shape)) if rank == DENSE else rank * sum(groups[name].shape)
        for name, chosen in ranks.items()
        for rank in chosen
    )


def loss(groups, ranks):
    total = 0.0
    for name, chosen in ranks.items():
        values = groups[name].spectra
        lost = sum(values[e, rank:].sum() for e, rank in enumerate(chosen) if rank != DENSE)
        total += lost / values.sum()
    return total


def test_close_to_the_best_of_all_allocations():
    groups = {"a": Group(spectra(2, 48, 0, 0.05), (48, 48)), "b": Group(spectra(2, 48, 1, 0.2), (48, 48))}
    options = [choice.rank for choice in groups["a"].table.choices]
    budget = 48 * 48 * 2
    best = min(
        loss(groups, trial)
        for choice in product(options, repeat=4)
        if cost(groups, trial := {"a": list(choice[:2]), "b": list(choice[2:])}) <= budget
    )
    found = ranks_of(groups, budget)
    assert cost(groups, found) <= budget
    assert loss(groups, found) <= 1.1 * best + 1e-12


@pytest.mark.parametrize("share", [0.1, 0.4, 0.9])
def test_budget_steps_and_number_of_ranks(share):
    groups = {i: Group(spectra(12, 128, i, 0.02 * (i + 1)), (128, 192)) for i in range(3)}
    total = 3 * 12 * 128 * 192
    ranks = ranks_of(groups, int(share * total))
    assert 0.97 * share * total <= cost(groups, ranks) <= share * total
    for chosen in ranks.values():
        assert all(rank == DENSE or rank % RANK_STEP == 0 for rank in chosen)
        assert len(set(chosen) - {0}) <= MAX_RANKS


def test_energy_is_kept_where_it_is():
    flat, steep = np.ones((4, 64)), spectra(4, 64, 0, 1.0)
    ranks = ranks_of({"flat": Group(flat, (64, 64)), "steep": Group(steep, (64, 64))}, 4 * 64 * 64)
    kept = [sum(64 * 64 if r == DENSE else r * 128 for r in ranks[name]) for name in ("flat", "steep")]
    assert kept[0] > kept[1]


def test_a_budget_below_nothing_is_an_error_and_zero_is_legal():
    groups = {"a": Group(spectra(2, 32, 0, 0.1), (32, 32))}
    with pytest.raises(ValueError, match="cannot be met"):
        ranks_of(groups, -1)
    assert ranks_of(groups, 0) == {"a": [0, 0]}
