"""Layouts of models and experts modules as they stand, and parts of a projection by what was chosen for its experts."""

import copy

from .allocate import DENSE, Choice, Storage
from .model.factorized_experts import FactorizedExperts
from .model.parts import DensePart, FactorPart, Layout, Part, Projections, layout_from
from .model.stream import StreamedModel


def layout_of(streamed: StreamedModel) -> Layout:
    """The layout of a model; an empty one for a native model."""
    found = getattr(streamed.config, "moesvd", None)
    if found:
        return layout_from(found)
    return Layout(streamed.config.model_type, source_bytes=streamed.source_bytes())


def dense_part(experts: list[int]) -> DensePart:
    """One own dense matrix for each of the experts."""
    return DensePart(experts, list(range(len(experts))))


def factor_part(experts: list[int], rank: int, left: list[int] | None = None, right: list[int] | None = None):
    """Factors of one rank; left and right give the bank row of each expert (default: one row each)."""
    own = list(range(len(experts)))
    return FactorPart(experts, rank, own if left is None else left, list(own) if right is None else right)


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


def dense_layout(experts_count: int, projections) -> Projections:
    """The native form: every expert dense."""
    return {name: [dense_part(list(range(experts_count)))] for name in projections}


def projections_of(module) -> Projections:
    """The layout of an experts module as it stands, native or ours."""
    if isinstance(module, FactorizedExperts):
        return copy.deepcopy(module.layout)
    from .model.experts import expert_count, shapes_of

    return dense_layout(expert_count(module), shapes_of(module))
