"""Ranks that spend a number of parameters: one share of the full rank for all, and the remainder spent as well."""

import itertools
from collections.abc import Sequence

from ..recipe.stage import STEP


def level_ranks(costs: Sequence[int], full: Sequence[int], budget: int, step: int = STEP) -> list[int]:
    """Nearly equal shares of their full rank for all items, multiples of `step`, never above `budget`.

    costs: parameters per unit of rank of each item; full: its largest useful rank. What rounding leaves goes to the
    first items, one step each, and then to the exchange of a few steps between items of different cost that comes
    closest to the budget.
    """
    low, high = 0.0, 1.0
    ranks = [0] * len(costs)
    for _ in range(50):
        share = (low + high) / 2
        trial = [int(f * share) // step * step for f in full]
        if sum(c * r for c, r in zip(costs, trial)) > budget:
            high = share
        else:
            low, ranks = share, trial
    rest = budget - sum(c * r for c, r in zip(costs, ranks))
    for item, (cost, limit) in enumerate(zip(costs, full)):
        if cost * step <= rest and ranks[item] + step <= limit:
            ranks[item] += step
            rest -= cost * step
    return _exchange(ranks, costs, full, rest, step)


def _exchange(ranks, costs, full, rest: int, step: int) -> list[int]:
    """The ranks with up to three steps more or less for each of (at most five) distinct costs, where that spends more
    of `rest`; the fewest steps among equals."""
    owners = {cost: [i for i, c in enumerate(costs) if c == cost] for cost in sorted(set(costs))[:5]}

    def moved(counts):
        made = list(ranks)
        for count, items in zip(counts, owners.values()):
            for _ in range(abs(count)):  # those furthest from where they go
                share = {i: made[i] / full[i] for i in items}
                made[min(items, key=share.__getitem__) if count > 0 else max(items, key=share.__getitem__)] += (
                    step if count > 0 else -step
                )
        return made

    def worth(counts):
        left = rest - sum(n * cost for n, cost in zip(counts, owners)) * step
        return left, sum(map(abs, counts))

    trials = sorted(itertools.product(*(range(-3, 4) for _ in owners)), key=worth)
    fits = (moved(t) for t in trials if 0 <= worth(t)[0] < rest)
    return next((made for made in fits if all(step <= r <= f for r, f in zip(made, full))), ranks)
