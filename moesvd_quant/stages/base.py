"""What a stage is given, and what it gives back."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..calibration.metric import Grams, blend, coverage
from ..calibration.store import Statistics
from ..decompose.whitening import whitened_error
from ..model.experts import find_experts, unknown_experts
from ..model.modeling_moesvd import FactorizedExperts
from ..model.stream import ModelError, StreamedModel

Progress = Callable[[int, int], None]


class StageError(ValueError):
    """A stage that cannot do what was asked; the message names layer, expert, tensor and remedy."""


@dataclass
class Context:
    """A stage reads its input checkpoint, statistics of the original model, its options; it changes nothing."""

    parent: StreamedModel
    statistics: Statistics
    options: Any
    seed: int
    device: torch.device
    progress: Progress = lambda done, total: None
    # Of a recipe with a budget: bytes for the routed experts at its end, what the stage before left to this one, the
    # options of a gptq stage to come, and tables that one plan made and the next may use.
    budget: float | None = None
    widths: dict = field(default_factory=dict)
    gptq: Any = None
    memo: dict = field(default_factory=dict)


@dataclass
class Plan:
    """What a stage will do: the layout of its output, and why (per layer, in words and figures).

    widths: bits planned for each part of each projection, {path: {projection: [bits]}}, for a gptq stage to come.
    """

    layout: dict
    decisions: dict = field(default_factory=dict)
    widths: dict = field(default_factory=dict)


def expert_grams(statistics: dict, path: str, device, metric=blend) -> dict[str, Grams]:
    """Gram matrices (in, in), by expert, that a projection's errors are judged by; `metric`: `blend` or `shrink`."""
    tokens = statistics[f"{path}/tokens"]
    try:
        gram_in, gram_mid = (Grams(statistics[f"{path}/{k}"], tokens, metric, device) for k in ("gram_in", "gram_mid"))
    except ValueError as error:
        raise StageError(f"{path}: {error}; give more or other calibration text") from error
    return {"gate": gram_in, "up": gram_in, "down": gram_mid}


def weak_experts(statistics: dict, path: str) -> dict[str, list[int]]:
    """Experts with few or no tokens, for the report."""
    return coverage(statistics[f"{path}/tokens"], statistics[f"{path}/gram_in"].shape[-1])


UNREACHED = "no calibration token reaches it"


def reached(statistics: dict, path: str) -> bool:
    """Whether any calibration token reached these experts; those for images see none of a text."""
    return bool(statistics[f"{path}/tokens"].sum())


def require_experts(parent: StreamedModel) -> None:
    """Before any walk: StageError for a dense model, ModelError for one whose experts are in no known form."""
    if any(True for layer in parent.layers for _ in find_experts(layer)):
        return
    for layer, name in zip(parent.layers, parent.layer_names):
        for path, why in unknown_experts(layer):
            raise ModelError(
                f"{name}.{path}: these experts are not understood: {why}. Supported are experts fused as transformers "
                "does it, and the forms of Llama 4, DBRX, JetMoE and LongCat-Flash (docs/architectures.md)"
            )
    raise StageError(f"{parent.folder}: a dense model: no layer has experts, there is nothing to compress")


def factorized(native, layout: dict, banks: Iterable[tuple[str, int | None, torch.Tensor]]) -> FactorizedExperts:
    """The experts module that stands in for `native`; its float banks come as (name, row or None for all, tensor)."""
    made = FactorizedExperts(native, layout)
    with torch.no_grad():
        for key, row, value in banks:
            bank = getattr(made, key)
            (bank if row is None else bank[row]).copy_(value)
    return made


def errors_of(made: FactorizedExperts, weights: dict, grams: dict) -> dict[str, list[float]]:
    """Whitened error of every matrix, {projection: [per expert]}; weights and grams by projection and expert."""
    return {
        name: [whitened_error(weights[name][e], made.dense(name, e), grams[name][e]) for e in range(made.experts)]
        for name in made.layout
    }
