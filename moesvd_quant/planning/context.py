"""What a stage is given, its plan, and what stages share."""

from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..calibration.compressed import CompressedWalk
from ..calibration.metric import Grams, blend, coverage
from ..calibration.paired import PairedWalk
from ..calibration.store import Statistics
from ..decompose.whitening import whitened_error
from ..errors import MoesvdError
from ..memory.pool import Pool
from ..model.experts import find_experts, unknown_experts
from ..model.folder import ModelError
from ..model.stream import StreamedModel
from ..recipe.recipe import Limits
from ..recipe.stage import Stage
from ..runtime.factorized_experts import FactorizedExperts
from ..runtime.parts import JOINT, Layout, Projections
from ..runtime.routers import Sources

Progress = Callable[[int, int], None]
LayerFunction = Callable[..., Any]  # of context, index, layer, its statistics


class StageError(MoesvdError, ValueError):
    """A stage that cannot do what was asked; the message names layer, expert, tensor and remedy."""


@dataclass
class Context:
    """A stage reads its input checkpoint, statistics of the original model, its options; it changes nothing."""

    parent: StreamedModel
    statistics: Statistics
    stage: Stage
    seed: int
    device: torch.device
    progress: Progress = lambda done, total: None  # of reading the model
    # The model that a plan reads weights from: the input checkpoint may not be made yet, and has a part of its experts.
    original: StreamedModel | None = None
    # Of a recipe with a budget: bytes for the routed experts at its end, the storages that the stage before planned,
    # the stage that will quantize, tables that one plan made and the next may use, and what to respect. A budget of
    # zero stands for the least that is possible.
    budget: float | None = None
    storages: dict = field(default_factory=dict)
    packing: Any = None
    memo: dict = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    pool: Pool = field(default_factory=Pool)
    surveyed: Progress = lambda done, total: None  # of planning layer by layer
    # Of a stage that trains: the windows, where its state lies while it works, and whom to tell of progress.
    training: Any = None
    folder: Path = Path()
    report: Callable[[str, int, int], None] = lambda what, done, total: None
    _walk: CompressedWalk | None = None
    _pair: PairedWalk | None = None

    def each_layer(self, work: LayerFunction, report: Progress, todo: Container[int] | None = None) -> Iterator:
        """(index, work(context, index, layer, its statistics)) of each layer (of `todo`) of the input checkpoint, as
        they are done: in order, or in parallel, where `work` has to be a function of a module or a partial of one."""
        count = len(self.parent.layer_names)
        wanted = [index for index in range(count) if todo is None or index in todo]
        if self.pool.parallel and not self.stage.in_order():
            self.statistics.ensure(self.progress)
            found = self.pool.map(LayerWork(self, work), wanted, self.device)
        else:
            found = self._in_order(work, wanted)
        for done, (index, result) in enumerate(found):
            yield index, result
            report(count - len(wanted) + done + 1, count)

    def _in_order(self, work: LayerFunction, wanted: list[int]) -> Iterator:
        if not wanted:
            return
        for index, statistics in enumerate(self.statistics.layers(self.progress)):
            if index in wanted:
                layer = self.parent.load_layer(index)
                yield index, work(self, index, layer, statistics)
                self.parent.drop_layer(index)

    def compressed_walk(self) -> CompressedWalk:
        """The walk over the parent with what this stage made of its layers so far."""
        if self._walk is None:
            self._walk = CompressedWalk(self.parent.folder, self.statistics)
        return self._walk

    def paired_walk(self) -> PairedWalk:
        """The walk over the original and the parent, with what this stage made of its layers so far."""
        if self._pair is None:
            self._pair = PairedWalk(self.parent.folder, self.statistics)
        return self._pair

    def __reduce__(self):
        """For a worker: what it needs to work on a layer, and no more."""
        more = {"packing": self.packing, "limits": self.limits, "folder": self.folder}
        return Context, (self.parent, self.statistics, self.stage, self.seed, self.device), more


@dataclass
class LayerWork:
    """What is done to a layer, for a worker."""

    context: Context
    work: LayerFunction

    def __call__(self, index: int) -> Any:
        layer = self.context.parent.load_layer(index)
        try:
            return self.work(self.context, index, layer, self.context.statistics.layer(index))
        finally:
            self.context.parent.drop_layer(index)


@dataclass
class Plan:
    """What a stage will do: the layout of its output, and why.

    decisions: of each experts module by its path, in words and figures. notes: the same of the whole model.
    storages: how each part of each projection is to be stored, {path: {projection: [Storage]}}, by the stage that
    quantizes.
    """

    layout: Layout
    decisions: dict[str, dict] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    storages: dict = field(default_factory=dict)


def expert_grams(statistics: dict, path: str, device, metric=blend, sources: Sources | None = None) -> dict[str, Grams]:
    """Gram matrices (in, in), by expert, that a projection's errors are judged by; `metric`: `blend` or `shrink`.

    sources: the original experts that each expert stands for, where they are not the same. Inputs of down are those of
    the first alone: the channels of others were in another order.
    """
    tokens = statistics[f"{path}/tokens"]
    try:
        gram_in, gram_mid = (
            Grams(statistics[f"{path}/{k}"], tokens, metric, device, groups)
            for k, groups in (("gram_in", sources), ("gram_mid", sources and [group[:1] for group in sources]))
        )
    except ValueError as error:
        raise StageError(f"{path}: {error}; give more or other calibration text") from error
    return {"gate": gram_in, "up": gram_in, JOINT: gram_in, "down": gram_mid}


def weak_experts(statistics: dict, path: str, sources: Sources | None = None) -> dict[str, list[int]]:
    """Experts with few or no tokens, for the report."""
    tokens = statistics[f"{path}/tokens"]
    if sources:
        tokens = torch.stack([tokens[group].sum() for group in sources])
    return coverage(tokens, statistics[f"{path}/gram_in"].shape[-1])


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


def factorized(
    native, layout: Projections, banks: Iterable[tuple[str, int | None, torch.Tensor]], sources: Sources | None = None
) -> FactorizedExperts:
    """The experts module that stands in for `native`; its float banks come as (name, row or None for all, tensor).

    sources: from which of the native experts its own come; None: the same ones.
    """
    made = FactorizedExperts(native, layout, sources)
    fill(made, banks)
    return made


@torch.no_grad()
def fill(made: FactorizedExperts, banks: Iterable[tuple[str, int | None, torch.Tensor]]) -> None:
    """Sets float banks: (name, row or None for all, tensor)."""
    for key, row, value in banks:
        bank = getattr(made, key)
        (bank if row is None else bank[row]).copy_(value)


def errors_of(made: FactorizedExperts, weights: dict, grams: dict) -> dict[str, list[float]]:
    """Whitened error of every matrix, {projection: [per expert]}; weights and grams by projection and expert."""
    found: dict[str, list[float]] = {}
    for name in made.layout:
        pairs = ((weights[name][e], made.dense(name, e), grams[name][e]) for e in range(made.experts))
        found[name] = [whitened_error(weight, dense.to(weight.device), gram) for weight, dense, gram in pairs]
    return found
