"""The subset of experts whose loss is least."""

from collections.abc import Callable, Collection
from itertools import combinations
from math import comb

EXHAUSTIVE = 2000  # subsets that are all tried; beyond, experts go one by one


def best_subset(count: int, keep: int, protected: Collection[int], loss: Callable[[list[int]], float]) -> list[int]:
    """The `keep` of `count` experts, protected ones among them, with the least `loss`; of equal ones the first.

    Of all subsets where there are few (NAEE, Lu et al. 2024). Of many by going back: again and again that expert goes
    without which the rest loses least.
    """
    free = [expert for expert in range(count) if expert not in protected]
    chosen = keep - len(protected)
    if comb(len(free), chosen) <= EXHAUSTIVE:
        return min((sorted({*protected, *others}) for others in combinations(free, chosen)), key=loss)
    kept = list(range(count))
    while len(kept) > keep:
        kept = min(([e for e in kept if e != out] for out in kept if out not in protected), key=loss)
    return kept
