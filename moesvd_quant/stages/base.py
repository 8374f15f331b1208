"""What a stage is given, and what it gives back."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..calibration.compressed import CompressedWalk
from ..calibration.metric import blend, coverage
from ..calibration.store import Statistics
from ..decompose.whitening import whitened_error
from ..model.experts import find_experts
from ..model.modeling_moesvd import FactorizedExperts
from ..model.stream import StreamedModel

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
    _walk: CompressedWalk | None = None

    def compressed_walk(self) -> CompressedWalk:
        """The walk over the parent with what this stage made of its layers so far."""
        if self._walk is None:
            known = self.statistics
            self._walk = CompressedWalk(self.parent.folder, known.dtype, self.device, known.windows)
        return self._walk


@dataclass
class Plan:
    """What a stage will do: the layout of its output, and why (per layer, in words and figures).

    widths: bits planned for each part of each projection, {path: {projection: [bits]}}, for a gptq stage to come.
    """

    layout: dict
    decisions: dict = field(default_factory=dict)
    widths: dict = field(default_factory=dict)


def expert_grams(statistics: dict, path: str, device, metric=blend) -> dict[str, torch.Tensor]:
    """Gram matrices (E, in, in) that each projection's errors are judged by; `metric` is `blend` or `shrink`."""
    tokens = statistics[f"{path}/tokens"]
    try:
        gram_in, gram_mid = (metric(statistics[f"{path}/{k}"], tokens) for k in ("gram_in", "gram_mid"))
    except ValueError as error:
        raise StageError(f"{path}: {error}; give more or other calibration text") from error
    gram_in, gram_mid = gram_in.to(device), gram_mid.to(device)
    return {"gate": gram_in, "up": gram_in, "down": gram_mid}


def weak_experts(statistics: dict, path: str) -> dict[str, list[int]]:
    """Experts with few or no tokens, for the report."""
    return coverage(statistics[f"{path}/tokens"], statistics[f"{path}/gram_in"].shape[-1])


def require_experts(parent: StreamedModel) -> None:
    """StageError for a dense model, before any walk."""
    if not any(True for layer in parent.decoder.layers for _ in find_experts(layer)):
        raise StageError(f"{parent.folder}: a dense model: no layer has experts, there is nothing to compress")


def factorized(native, layout: dict, banks: dict[str, torch.Tensor]) -> FactorizedExperts:
    """The experts module that stands in for `native`, its float banks filled."""
    made = FactorizedExperts(native, layout)
    with torch.no_grad():
        for key, value in banks.items():
            getattr(made, key).copy_(value)
    return made


def errors_of(made: FactorizedExperts, weights: dict, grams: dict) -> dict[str, list[float]]:
    """Whitened error of every matrix, {projection: [per expert]}; weights and grams by projection and expert."""
    return {
        name: [whitened_error(weights[name][e], made.dense(name, e), grams[name][e]) for e in range(made.experts)]
        for name in made.layout
    }
