"""What a ratio leaves, in parameters."""

from collections.abc import Container

from ..checkpoint.accounting import stored_tensors
from ..model.experts import expert_count, find_experts, shapes_of
from ..model.remaining import is_gone
from ..model.stream import StreamedModel
from .context import StageError


def parameters_of(parent: StreamedModel, paths: Container[str] | None = None) -> int:
    """Parameters of all experts modules, or of those at `paths`."""
    return sum(
        expert_count(experts) * sum(out * in_features for out, in_features in shapes_of(experts).values())
        for layer, name in zip(parent.layers, parent.layer_names)
        for path, experts in find_experts(layer)
        if not is_gone(experts) and (paths is None or f"{name}.{path}" in paths)
    )


def kept_share(parent: StreamedModel, ratio: float, of: str, changed: Container[str]) -> float:
    """Parameters that `ratio` leaves to the experts modules at the paths `changed`, where all others stay as they are.

    of: what ratio is a share of, the parameters of the "experts" or of the "model" that the stage is given. StageError
    where the others alone are more than the ratio leaves to all, or a share of the model more than all experts.
    """
    whole = parameters_of(parent)
    rest = whole - parameters_of(parent, changed)
    removed = ratio * (sum(t.numel() for t in stored_tensors(parent.model).values()) if of == "model" else whole)
    if removed >= whole:
        raise StageError(f"ratio {ratio} of the model: all its experts are {ratio * whole / removed:.3f}; lower it")
    left = whole - removed - rest
    if left <= 0:
        raise StageError(
            f"ratio {ratio}: no calibration token reaches {rest / whole:.1%} of the expert parameters, which stay as "
            "they are; lower the ratio, or give calibration text that reaches them"
        )
    return left
