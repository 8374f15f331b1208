"""What every expert matrix becomes under one budget. Pure functions on tables of choices."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from ..quantize.registry import FLOAT, Storage

Key = TypeVar("Key", bound=Hashable)
RANK_STEP = 16
DENSE = -1  # in place of a rank: the matrix stays whole
MAX_RANKS = 4  # distinct choices per layer and projection: each is one tensor and one grouped product
# Below this share of the least slope of any table, a price makes no difference, even to sums over experts.
NEGLIGIBLE = 1e-3
# Which few choices of a group are best depends on the price, and the price on them: tried from around the free price.
STARTS, ROUNDS = (0.7, 0.85, 1.0, 1.2, 1.5), 2


class Choice(NamedTuple):
    rank: int  # 0: no matrix at all; DENSE
    storage: Storage = FLOAT


NOTHING = Choice(0)


@dataclass(frozen=True)
class Table:
    """Choices of the matrices of one projection of one layer; the first is NOTHING.

    costs: (choices,) in the unit of the budget; errors: (experts, choices), in a unit that is the same in all tables.
    """

    choices: list[Choice]
    costs: np.ndarray
    errors: np.ndarray


@dataclass(frozen=True)
class Allocation(Generic[Key]):
    """choices: of each expert of each group; error: their sum; bound: no allocation within the budget has less, however
    many distinct choices a group may have."""

    choices: dict[Key, list[Choice]]
    error: float
    bound: float

    @property
    def gap(self) -> float:
        """How much more error than the bound, as a share of the error."""
        return min(1.0, max(0.0, 1 - self.bound / self.error)) if self.error > 0 else 0.0


def useful_ranks(shape: tuple[int, int]) -> list[int]:
    """Multiples of RANK_STEP whose factors hold fewer parameters than the matrix (out, in)."""
    out, in_features = shape
    limit = min(min(shape), -(-out * in_features // (out + in_features)) - 1)
    return list(range(RANK_STEP, limit + 1, RANK_STEP))


def allocate(
    tables: dict[Key, Table], budget: float, ties: dict[Key, Hashable] | None = None, distinct: int = MAX_RANKS
) -> Allocation[Key]:
    """A choice for each expert of each group: least summed error at a cost of at most `budget`.

    One price per unit of cost for all matrices of the model (the Lagrangian of the budget), found by bisection; then
    whatever still fits is spent where it helps most. At most `distinct` choices (besides NOTHING) per group.
    ties: groups with the same value are stored in one way. ValueError where even the cheapest choices cost more.
    """
    ties = ties or {}
    least = least_cost(tables)
    if budget < least:
        raise ValueError(f"a budget of {budget:.0f} cannot be met, the least possible is {least:.0f}")
    everything = {name: np.arange(len(table.choices)) for name, table in tables.items()}
    low, _, bound = _price(tables, everything, budget)
    best, least_error = {}, np.inf
    for share in STARTS:
        price = low * share
        for _ in range(ROUNDS):
            few = _restrict(tables, price, ties, distinct)
            price, high, _ = _price(tables, few, budget)
            chosen = _choose(tables, few, high)
            _spend_rest(chosen, tables, few, budget - _spent(chosen, tables), ties, distinct)
            error = _error(chosen, tables)
            if error < least_error:
                best, least_error = chosen, error
    choices = {name: [tables[name].choices[i] for i in at] for name, at in best.items()}
    return Allocation(choices, least_error, bound)


def least_cost(tables: dict[Key, Table]) -> float:
    """What the cheapest choices of all experts cost together."""
    return float(sum(len(table.errors) * table.costs.min() for table in tables.values()))


def _price(tables, few, budget: float) -> tuple[float, float, float]:
    """The prices around which the choice from the columns `few` stops and begins to fit the budget, and the Lagrangian
    bound: no choice within the budget from these columns has a smaller error."""
    low, high = _price_range(tables, few)
    bound = -np.inf
    while low < (middle := low * (high / low) ** 0.5) < high:  # until no number lies between them
        spent = error = 0.0
        for name, table in tables.items():
            errors, costs = table.errors[:, few[name]], table.costs[few[name]]
            at = (errors + middle * costs).argmin(1)
            spent += costs[at].sum()
            error += errors[np.arange(len(at)), at].sum()
        bound = max(bound, error + middle * (spent - budget))
        low, high = (middle, high) if spent > budget else (low, middle)
    return low, high, float(bound)


def _price_range(tables, few) -> tuple[float, float]:
    """Prices (error per unit of cost) at which nothing is too dear, and at which nothing is worth having: from the
    tables' own slopes, so that no unit of error or cost matters."""
    steep, flat = [], []
    for name, table in tables.items():
        errors, costs = table.errors[:, few[name]], table.costs[few[name]]
        cheap, best = costs.argmin(), errors.argmin(1)
        steep.append(_slopes(errors[:, [cheap]] - errors, costs - costs[cheap]))
        least = errors[np.arange(len(best)), best][:, None]
        flat.append(_slopes(errors - least, costs[best][:, None] - costs))
    slopes = np.concatenate(steep), np.concatenate(flat)
    if not all(map(len, slopes)):  # nothing to choose
        return 1.0, 2.0
    return float(NEGLIGIBLE * slopes[1].min()), float(2 * slopes[0].max())


def _slopes(gain: np.ndarray, extra: np.ndarray) -> np.ndarray:
    """Gain per extra cost, of those that gain and cost something."""
    gain, extra = np.broadcast_arrays(gain, extra)
    real = (gain > 0) & (extra > 0)
    return gain[real] / extra[real]


def _choose(tables, few, price: float) -> dict:
    """Column of each expert of each group at a price, from the columns `few`."""
    return {
        name: few[name][(table.errors[:, few[name]] + price * table.costs[few[name]]).argmin(1)]
        for name, table in tables.items()
    }


def _spent(chosen, tables) -> float:
    return float(sum(tables[name].costs[at].sum() for name, at in chosen.items()))


def _error(chosen, tables) -> float:
    return float(sum(tables[name].errors[np.arange(len(at)), at].sum() for name, at in chosen.items()))


def _restrict(tables, price: float, ties, distinct: int) -> dict:
    """The few columns of each group that serve its experts best at a price; tied groups get those of one storage."""
    found: dict = {}
    tied: dict[Hashable, list] = {}
    for name, table in tables.items():
        tied.setdefault(ties[name], []).append(name) if name in ties else found.update(
            {name: _few(table, price, distinct)}
        )
    for names in tied.values():
        trials = {}
        for storage in sorted({c.storage for name in names for c in tables[name].choices if c.rank}):
            allowed = {name: _columns(tables[name], storage) for name in names}
            if all(len(columns) for columns in allowed.values()):
                few = {name: _few(tables[name], price, distinct, allowed[name]) for name in names}
                trials[storage] = sum(_objective(tables[name], price, at).min(1).sum() for name, at in few.items()), few
        if not trials:
            raise ValueError(f"{', '.join(map(str, names))}: no format and rate serves all of them")
        found |= min(trials.values(), key=lambda trial: trial[0])[1]
    return found


def _columns(table: Table, storage: Storage) -> np.ndarray:
    """Choices that are stored in one way, and NOTHING."""
    return np.array([i for i, c in enumerate(table.choices) if c.storage == storage or c.rank == 0], dtype=int)


def _objective(table: Table, price: float, columns: np.ndarray) -> np.ndarray:
    return table.errors[:, columns] + price * table.costs[columns]


def _few(table: Table, price: float, distinct: int, columns: np.ndarray | None = None) -> np.ndarray:
    """At most `distinct` of the columns (and NOTHING, if it is one) whose best per expert sum to the least: added
    one by one, then exchanged while that helps (the k-median problem's local search)."""
    columns = np.arange(len(table.choices)) if columns is None else columns
    if len(columns) <= distinct:
        return columns
    objective = _objective(table, price, columns)
    free = [at for at, column in enumerate(columns) if table.choices[column].rank == 0]
    held: list[int] = []

    def best_with(others: list[int]) -> tuple[float, int]:
        start = objective[:, [*free, *others]].min(1) if free or others else np.full(len(objective), np.inf)
        sums = np.minimum(start[:, None], objective).sum(0)
        return float(sums.min()), int(sums.argmin())

    for _ in range(distinct):
        held.append(best_with(held)[1])
    value, improved = best_with(held)[0], True
    while improved:
        improved = False
        for place in range(distinct):
            others = held[:place] + held[place + 1 :]
            trial, at = best_with(others)
            if trial < value * (1 - 1e-12):
                value, held, improved = trial, [*others, at], True
                break
    return columns[sorted({*free, *held})]


def _spend_rest(chosen, tables, few, rest: float, ties, distinct: int) -> None:
    """Moves single experts to a dearer choice, best gain per cost first, while one is affordable: to one of the columns
    `few`, or to any where the group has fewer than `distinct` in use and is not tied."""

    def best_move(name):
        """(gain per cost, expert, column, cost) of the best affordable move in a group."""
        table, now = tables[name], chosen[name]
        used = {at for at in now.tolist() if table.choices[at].rank}
        columns = few[name] if name in ties or len(used) >= distinct else np.arange(len(table.choices))
        extra = table.costs[columns] - table.costs[now][:, None]
        gain = table.errors[np.arange(len(now)), now][:, None] - table.errors[:, columns]
        affordable = (extra > 0) & (extra <= rest)
        rate = np.divide(gain, extra, out=np.zeros_like(gain), where=affordable)
        expert, at = np.unravel_index(rate.argmax(), rate.shape)
        return rate[expert, at], int(expert), columns[at], extra[expert, at]

    moves = {name: best_move(name) for name in chosen}
    while moves:
        name = max(moves, key=lambda key: moves[key][0])
        rate, expert, column, extra = moves[name]
        if rate <= 0:
            return
        if extra <= rest:
            chosen[name][expert] = column
            rest -= extra
        moves[name] = best_move(name)
