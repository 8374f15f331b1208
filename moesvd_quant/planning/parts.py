"""Parts of a projection by what was chosen for its experts."""

from ..checkpoint.layout import dense_part, factor_part
from ..runtime.parts import Part
from .knapsack import DENSE, Choice, Storage


def parts_by_rank(ranks: list[int]) -> list[Part]:
    """Parts of a projection whose experts have own factors of these ranks, or stay DENSE; 0 is no tensor."""
    parts: list[Part] = []
    for rank in sorted(set(ranks) - {0}, reverse=True):
        experts = [e for e, r in enumerate(ranks) if r == rank]
        parts.append(dense_part(experts) if rank == DENSE else factor_part(experts, rank))
    return parts


def parts_by_choice(choices: list[Choice]) -> tuple[list[Part], list[Storage]]:
    """Parts of a projection whose experts become what was chosen, and how each part is to be stored."""
    distinct = sorted({choice for choice in choices if choice.rank}, reverse=True)
    users = [[e for e, choice in enumerate(choices) if choice == wanted] for wanted in distinct]
    parts: list[Part] = [
        dense_part(experts) if choice.rank == DENSE else factor_part(experts, choice.rank)
        for choice, experts in zip(distinct, users)
    ]
    return parts, [choice.storage for choice in distinct]
