"""Layouts: which tensors make up which weights. A layout is the plan of a stage and the `config.moesvd` of
its checkpoint (`model/parts.py` explains it)."""

import copy

from .allocate import DENSE, Choice
from .model.factorized_experts import FactorizedExperts
from .model.modeling_moesvd import FORMAT
from .model.stream import StreamedModel


def empty_layout(native_type: str) -> dict:
    return {"format": FORMAT, "native_type": native_type, "experts": {}, "linears": {}}


def layout_of(streamed: StreamedModel) -> dict:
    """A copy of the model's layout; an empty one for a native model."""
    found = getattr(streamed.config, "moesvd", None)
    if found:
        return copy.deepcopy(found)
    size = streamed.source_bytes()
    return empty_layout(streamed.config.model_type) | ({"source_bytes": size} if size else {})


def dense_part(experts: list[int]) -> dict:
    """One own dense matrix for each of the experts."""
    return {"experts": experts, "dense": list(range(len(experts))), "quant": {}}


def factor_part(experts: list[int], rank: int, left: list[int] | None = None, right: list[int] | None = None):
    """Factors of one rank; left and right give the bank row of each expert (default: one row each)."""
    own = list(range(len(experts)))
    rows = {"left": own if left is None else left, "right": own if right is None else right}
    return {"experts": experts, "rank": rank, "quant": {}} | rows


def parts_by_rank(ranks: list[int]) -> list[dict]:
    """Parts of a projection whose experts have own factors of these ranks, or stay DENSE; 0 is no tensor."""
    parts = []
    for rank in sorted(set(ranks) - {0}, reverse=True):
        experts = [e for e, r in enumerate(ranks) if r == rank]
        parts.append(dense_part(experts) if rank == DENSE else factor_part(experts, rank))
    return parts


def parts_by_choice(choices: list[Choice]) -> tuple[list[dict], list[int]]:
    """Parts of a projection whose experts have these ranks and widths, and the bits of each part."""
    distinct = sorted({choice for choice in choices if choice.rank}, reverse=True)
    users = [[e for e, choice in enumerate(choices) if choice == wanted] for wanted in distinct]
    parts = [
        dense_part(experts) if choice.rank == DENSE else factor_part(experts, choice.rank)
        for choice, experts in zip(distinct, users)
    ]
    return parts, [choice.bits for choice in distinct]


def dense_layout(experts_count: int, projections) -> dict:
    """The native form: every expert dense."""
    return {name: [dense_part(list(range(experts_count)))] for name in projections}


def projections_of(module) -> dict:
    """The layout of an experts module as it stands, native or ours."""
    if isinstance(module, FactorizedExperts):
        return copy.deepcopy(module.layout)
    from .model.experts import expert_count, shapes_of

    return dense_layout(expert_count(module), shapes_of(module))
