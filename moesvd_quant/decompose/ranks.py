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


EPSILON = 1e-6  # of the largest importance: what an expert without any counts


def importance_ranks(
    importance: Sequence[float], power: float, costs: Sequence[int], full: Sequence[int], budget: int, step: int = STEP
) -> list[int]:
    """Ranks of one layer's items proportional to (I + eps)^power (MoE-I², Yang et al. 2024) and to their full ranks,
    multiples of `step`, at least one step and at most the full rank; never above `budget`.

    importance: I of each item, at least 0; costs: parameters per unit of its rank. What rounding leaves goes to the
    most important items, a step each. ValueError where one step for each is more than the budget.
    """
    if step * sum(costs) > budget:
        raise ValueError(f"{budget} parameters are less than rank {step} for each of {len(costs)} matrices")
    top = max(importance)
    weights = [(value / top + EPSILON) ** power if top > 0 else 1.0 for value in importance]

    def at(scale: float) -> list[int]:
        return [min(f, max(step, int(scale * w * f) // step * step)) for w, f in zip(weights, full)]

    def spent(ranks: list[int]) -> int:
        return sum(cost * rank for cost, rank in zip(costs, ranks))

    low, high = 0.0, 1 / min(weights)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(at(middle)) <= budget else (low, middle)
    ranks = at(low)
    rest = budget - spent(ranks)
    for item in sorted(range(len(costs)), key=lambda i: -weights[i]):
        if costs[item] * step <= rest and ranks[item] + step <= full[item]:
            ranks[item] += step
            rest -= costs[item] * step
    return ranks


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
