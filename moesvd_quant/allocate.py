"""What every expert matrix becomes under one budget. Pure functions on tables of choices."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

Key = TypeVar("Key", bound=Hashable)
RANK_STEP = 16
DENSE = -1  # in place of a rank: the matrix stays whole
FLOAT = 16  # in place of bits: not quantized
MAX_RANKS = 4  # distinct choices per layer and projection: each is one tensor and one grouped product


class Choice(NamedTuple):
    rank: int  # 0: no matrix at all; DENSE
    bits: int = FLOAT


NOTHING = Choice(0)


@dataclass(frozen=True)
class Table:
    """Choices of the matrices of one projection of one layer; the first is NOTHING.

    costs: (choices,) in the unit of the budget; errors: (experts, choices), as shares of the energy of all experts.
    """

    choices: list[Choice]
    costs: np.ndarray
    errors: np.ndarray


def useful_ranks(shape: tuple[int, int]) -> list[int]:
    """Multiples of RANK_STEP whose factors hold fewer parameters than the matrix (out, in)."""
    out, in_features = shape
    limit = min(min(shape), -(-out * in_features // (out + in_features)) - 1)
    return list(range(RANK_STEP, limit + 1, RANK_STEP))


def rank_table(spectra: np.ndarray, shape: tuple[int, int]) -> Table:
    """Costs in parameters. spectra (experts, min(out, in)): squared whitened singular values, largest first."""
    ranks = useful_ranks(shape)
    total = spectra.sum()
    kept = np.concatenate([np.zeros((len(spectra), 1)), spectra.cumsum(1)], 1)
    lost = kept[:, -1:] - kept[:, [0, *ranks]]
    errors = np.concatenate([lost, np.zeros((len(lost), 1))], 1)
    costs = np.array([0, *(rank * sum(shape) for rank in ranks), shape[0] * shape[1]], dtype=float)
    choices = [NOTHING, *(Choice(rank) for rank in ranks), Choice(DENSE)]
    return Table(choices, costs, errors / total if total > 0 else errors)


def allocate(tables: dict[Key, Table], budget: float) -> dict[Key, list[Choice]]:
    """A choice for each expert of each group: least summed error at a cost of at most `budget`.

    One price per unit of cost for all matrices of the model, found by bisection; then whatever still fits is spent
    where it helps most. At most MAX_RANKS distinct choices (besides NOTHING) per group. ValueError below zero.
    """
    if budget < 0:
        raise ValueError(f"a budget of {budget:.0f} cannot be met")

    def solve(price):
        return {name: _choose(table, price) for name, table in tables.items()}

    def spent(chosen):
        return sum(tables[name].costs[indices].sum() for name, indices in chosen.items())

    low, high = 1e-16, 1.0  # prices: error per unit of cost; at `high` nothing is worth having
    best = solve(high)
    for _ in range(60):
        middle = (low * high) ** 0.5
        chosen = solve(middle)
        if spent(chosen) > budget:
            low = middle
        else:
            high, best = middle, chosen
    _spend_rest(best, tables, budget - spent(best))
    return {name: [tables[name].choices[i] for i in indices] for name, indices in best.items()}


def _choose(table: Table, price: float) -> np.ndarray:
    """Choice of each expert at a price, with few distinct ones."""
    objective = table.errors + price * table.costs
    chosen = objective.argmin(1)
    allowed = sorted(set(chosen.tolist()) | {0})
    while len(allowed) > MAX_RANKS + 1:
        trials = [[o for o in allowed if o != gone] for gone in allowed[1:]]
        losses = [objective[:, trial].min(1).sum() for trial in trials]
        allowed = trials[int(np.argmin(losses))]
    return np.array(allowed)[objective[:, allowed].argmin(1)]


def _spend_rest(chosen, tables, rest: float) -> None:
    """Moves single experts to a dearer choice, best gain per cost first, while one is affordable. A choice that
    its group has not yet is open as long as the group has fewer than MAX_RANKS."""
    while True:
        best, where = 0.0, None
        for name, now in chosen.items():
            errors, costs = tables[name].errors, tables[name].costs
            here = set(now.tolist()) | {0}
            options = np.array(sorted(here) if len(here) > MAX_RANKS else range(len(costs)))
            extra = costs[options] - costs[now][:, None]
            gain = errors[np.arange(len(now)), now][:, None] - errors[:, options]
            rate = np.where((extra > 0) & (extra <= rest), gain / np.maximum(extra, 1), 0)
            expert, option = np.unravel_index(rate.argmax(), rate.shape)
            if rate[expert, option] > best:
                best, where = rate[expert, option], (name, expert, options[option], extra[expert, option])
        if where is None:
            return
        name, expert, option, extra = where
        chosen[name][expert] = option
        rest -= extra
