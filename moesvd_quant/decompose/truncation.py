"""ASVD's search for truncation ranks: what was measured to cost least is truncated first."""

from collections.abc import Sequence

from .ranks import STEP

RATIOS = tuple(tenth / 10 for tenth in range(1, 10))  # shares of the parameters that a matrix may keep
SAMPLES = 32  # windows that truncations are judged by


def rank_of(ratio: float, shape: tuple[int, int]) -> int:
    """The rank at which factors of a matrix (out, in) have `ratio` of its parameters: a multiple of STEP."""
    out, in_features = shape
    return max(STEP, int(ratio * out * in_features / (out + in_features)) // STEP * STEP)


def search_truncation(
    losses: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], whole: Sequence[int], budget: int
) -> list[int | None]:
    """Which truncation each group takes, None for none: STRS of ASVD (Yuan et al. 2023, section 3.3).

    All truncations of all groups are sorted by the loss that each one was measured to cause alone. The shortest run of
    them from the least on is taken that makes the model small enough, and a group takes the smallest of its own.

    losses[g][k], costs[g][k]: loss, and parameters, of group g in truncation k; whole[g]: parameters as it is.
    ValueError, with the parameters that all truncations leave, where these are more than the budget.
    """
    order = sorted((loss, group, k) for group, own in enumerate(losses) for k, loss in enumerate(own))
    taken: list[int | None] = [None] * len(whole)
    held = list(whole)
    for _, group, k in order:
        if sum(held) <= budget:
            return taken
        if costs[group][k] < held[group]:
            taken[group], held[group] = k, costs[group][k]
    if sum(held) > budget:
        raise ValueError(f"{sum(held)} parameters remain where everything is truncated most, and {budget} may")
    return taken
