"""What is left of the experts of a module, beside their originals: which, whole or not, and which became one."""

from torch import nn

from ..runtime.factorized_experts import FactorizedExperts
from ..runtime.parts import DensePart
from ..runtime.routers import Sources
from .experts import expert_count, find_experts, is_shared


def is_gone(experts: nn.Module) -> bool:
    """Whether nothing is left of any expert: the layer was dropped."""
    return isinstance(experts, FactorizedExperts) and not any(experts.layout.values())


def is_whole(experts: nn.Module) -> bool:
    """Whether the weights are the original's, if perhaps of fewer experts: no factors, nothing packed or cut."""
    if not isinstance(experts, FactorizedExperts):
        return True
    parts = [part for parts in experts.layout.values() for part in parts]
    plain = all(isinstance(part, DensePart) and not part.packed for part in parts)
    whole = all(part.rows is None and part.columns is None for part in parts)
    return plain and whole and all(part.users("dense") == list(range(experts.experts)) for part in parts)


def counts_left(model: nn.Module) -> list[int]:
    """How many routed experts layers have, each number once; none where no layer lost an expert, or had them merged."""
    found = [experts for _, experts in find_experts(model) if not is_shared(experts)]
    if not any(isinstance(experts, FactorizedExperts) and experts.sources for experts in found):
        return []
    return sorted({expert_count(experts) for experts in found})


def sources_of(experts: nn.Module) -> Sources:
    """From which original experts each expert of a module comes."""
    own = experts.sources if isinstance(experts, FactorizedExperts) else None
    return own or [[expert] for expert in range(expert_count(experts))]


def members_of(experts: nn.Module) -> Sources:
    """The original experts that each expert of a module stands for, first that whose order of channels it has: those
    that it comes from, and those of experts that were merged with it and share its matrix."""
    own, groups = sources_of(experts), shared_rows(experts)
    return [[source for member in group for source in own[member]] for group in groups]


def shared_rows(experts: nn.Module) -> list[list[int]]:
    """For each expert those whose whole down is the same row of a bank, in the layout's order; itself alone where it
    has a row, or factors, of its own."""
    found = [[expert] for expert in range(expert_count(experts))]
    parts = experts.layout["down"] if isinstance(experts, FactorizedExperts) else []
    if len(parts) == 1 and isinstance(parts[0], DensePart):
        named = list(zip(parts[0].experts, parts[0].dense))
        for expert, row in named:
            found[expert] = [other for other, same in named if same == row]
    return found
