"""Layouts of models and experts modules as they stand."""

import copy

from ..model.stream import StreamedModel
from ..runtime.factorized_experts import FactorizedExperts
from ..runtime.parts import DensePart, FactorPart, Layout, Projections, layout_from


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


def dense_layout(experts_count: int, projections) -> Projections:
    """The native form: every expert dense."""
    return {name: [dense_part(list(range(experts_count)))] for name in projections}


def projections_of(module) -> Projections:
    """The layout of an experts module as it stands, native or ours."""
    if isinstance(module, FactorizedExperts):
        return copy.deepcopy(module.layout)
    from ..model.experts import expert_count, shapes_of

    return dense_layout(expert_count(module), shapes_of(module))
