"""Which rank every expert matrix gets under one budget of parameters. Pure functions on spectra."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

RANK_STEP = 16
Key = TypeVar("Key", bound=Hashable)
DENSE = -1  # in place of a rank: the matrix stays as it is
MAX_RANKS = 4  # distinct ranks per layer and projection: each is one tensor and one grouped product


@dataclass(frozen=True)
class Group:
    """The matrices of one projection of one layer.

    spectra: (experts, min(out, in)) squared whitened singular values, largest first; shape: (out, in).
    """

    spectra: np.ndarray
    shape: tuple[int, int]

    def ranks(self) -> list[int]:
        """Ranks worth having: multiples of RANK_STEP that cost less than the matrix, then DENSE."""
        out, in_features = self.shape
        limit = min(min(self.shape), -(-out * in_features // (out + in_features)) - 1)
        return [*range(0, limit + 1, RANK_STEP), DENSE]

    def costs(self) -> np.ndarray:
        """Parameters of each option of `ranks`."""
        out, in_features = self.shape
        return np.array([out * in_features if r == DENSE else r * (out + in_features) for r in self.ranks()])

    def errors(self) -> np.ndarray:
        """(experts, options) energy lost, as a share of the energy of all experts of the group."""
        total = self.spectra.sum()
        kept = np.concatenate([np.zeros((len(self.spectra), 1)), self.spectra.cumsum(1)], 1)
        lost = kept[:, -1:] - kept[:, [r for r in self.ranks() if r != DENSE]]
        lost = np.concatenate([lost, np.zeros((len(lost), 1))], 1)
        return lost / total if total > 0 else lost


def global_ranks(groups: dict[Key, Group], budget: int) -> dict[Key, list[int]]:
    """Ranks (or DENSE) of each expert of each group: least summed error with at most `budget` parameters.

    One price per parameter for all matrices of the model (a global threshold on energy per parameter),
    found by bisection; then whatever still fits is spent where it helps most. At most MAX_RANKS distinct
    non-zero options per group. ValueError where the budget is negative.
    """
    if budget < 0:
        raise ValueError(f"a budget of {budget} parameters cannot be met")
    tables = {name: (group.errors(), group.costs().astype(float)) for name, group in groups.items()}

    def solve(price):
        return {name: _choose(errors, costs, price) for name, (errors, costs) in tables.items()}

    def spent(choices):
        return sum(tables[name][1][chosen].sum() for name, chosen in choices.items())

    low, high = 1e-16, 1.0  # prices: error per parameter; at `high` everything is rank 0
    best = solve(high)
    for _ in range(60):
        middle = (low * high) ** 0.5
        choices = solve(middle)
        if spent(choices) > budget:
            low = middle
        else:
            high, best = middle, choices
    _spend_rest(best, tables, budget - spent(best))
    return {name: [groups[name].ranks()[i] for i in chosen] for name, chosen in best.items()}


def _choose(errors: np.ndarray, costs: np.ndarray, price: float) -> np.ndarray:
    """Option of each expert at a price per parameter, with few distinct ones."""
    objective = errors + price * costs
    chosen = objective.argmin(1)
    allowed = sorted(set(chosen.tolist()) | {0})
    while len(allowed) > MAX_RANKS + 1:  # option 0 is rank 0, which is no tensor
        trials = [[o for o in allowed if o != gone] for gone in allowed[1:]]
        losses = [objective[:, trial].min(1).sum() for trial in trials]
        allowed = trials[int(np.argmin(losses))]
    return np.array(allowed)[objective[:, allowed].argmin(1)]


def _spend_rest(choices, tables, rest: float) -> None:
    """Moves single experts to a dearer option, best gain per parameter first, while one is affordable. An
    option that its group has not yet is open as long as the group has fewer than MAX_RANKS."""
    while True:
        best, where = 0.0, None
        for name, chosen in choices.items():
            errors, costs = tables[name]
            here = set(chosen.tolist()) | {0}
            options = np.array(sorted(here) if len(here) > MAX_RANKS else range(len(costs)))
            extra = costs[options] - costs[chosen][:, None]
            gain = errors[np.arange(len(chosen)), chosen][:, None] - errors[:, options]
            rate = np.where((extra > 0) & (extra <= rest), gain / np.maximum(extra, 1), 0)
            expert, option = np.unravel_index(rate.argmax(), rate.shape)
            if rate[expert, option] > best:
                best, where = rate[expert, option], (name, expert, options[option], extra[expert, option])
        if where is None:
            return
        name, expert, option, extra = where
        choices[name][expert] = option
        rest -= extra


def level_ranks(costs: list[int], full: list[int], budget: int) -> list[int]:
    """Nearly equal ranks, multiples of RANK_STEP, one per item, spending as much of `budget` as they can.

    costs: parameters per unit of rank of each item; full: its largest useful rank. All items get the same
    share of their full rank; what rounding leaves goes to the first items, one step each.
    """
    low, high = 0.0, 1.0
    ranks = [0] * len(costs)
    for _ in range(50):
        share = (low + high) / 2
        trial = [min(f, int(f * share) // RANK_STEP * RANK_STEP) for f in full]
        if sum(c * r for c, r in zip(costs, trial)) > budget:
            high = share
        else:
            low, ranks = share, trial
    rest = budget - sum(c * r for c, r in zip(costs, ranks))
    for item, (cost, limit) in enumerate(zip(costs, full)):
        if cost * RANK_STEP <= rest and ranks[item] + RANK_STEP <= limit:
            ranks[item] += RANK_STEP
            rest -= cost * RANK_STEP
    return ranks
