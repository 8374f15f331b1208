"""How long a run will take on this machine: work counted on shapes, by rates that a second of measuring gives."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch

from ..calibration.effect import LAYERS, TOKENS
from ..calibration.recording import linear_sums
from ..calibration.written import ROUNDS
from ..evaluation.flops import flops_per_token
from ..memory.limits import experts_of_a_token
from ..model.experts import expert_count, find_experts, is_shared, shapes_of
from ..model.stream import StreamedModel
from ..recipe.effort import Effort
from ..recipe.stage import Stage, packing_stage
from .forecast import SINGLE

SIDE, ROWS = 1024, 128  # of the matrices that rates are measured on
REPEATS = 3
TRAINED = 4  # walks' worth of operations of a token that is trained on: forward, backward (two), the teacher


@dataclass(frozen=True)
class Rates:
    """Seconds of one operation here, with all threads of a task; see `Effort`. coded: of a weight, by format."""

    products: float
    factors: float
    eigen: float
    coded: dict[str, float]


@dataclass(frozen=True)
class Seconds:
    """What a run will take. text: its walks through the calibration text. weights: what stages do to matrices.
    training: of what trains. Evaluation is not counted, nor what the disk makes wait."""

    text: float
    weights: float
    training: float

    @property
    def total(self) -> float:
        return self.text + self.weights + self.training

    def describe(self) -> str:
        parts = {"the calibration text": self.text, "the weights": self.weights, "training": self.training}
        told = ", ".join(f"{_spoken(value)} for {name}" for name, value in parts.items() if value)
        return f"time: about {_spoken(self.total)} on this machine as it is now ({told}), without evaluation"


def _spoken(seconds: float) -> str:
    for size, unit in ((3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds" if seconds >= 10 else "some seconds"


@torch.no_grad()
def measured_rates(stages: Sequence[Stage], device: torch.device) -> Rates:
    """Rates of a machine, measured in about a second; where a format's search is compiled for the first time, in
    half a minute."""
    generator = torch.Generator().manual_seed(0)
    tall = torch.randn(2 * SIDE, SIDE, generator=generator).to(device)
    gram = tall.T @ tall
    small = gram[: SIDE // 2, : SIDE // 2].contiguous()
    products = _least(lambda: tall @ gram, device) / (4 * SIDE**3)
    factors = _least(lambda: torch.linalg.cholesky_ex(gram), device) / (SIDE**3 / 3)
    eigen = _least(lambda: torch.linalg.eigh(small), device) / (SIDE // 2) ** 3
    return Rates(products, factors, eigen, _coded(packing_stage(stages), tall[:ROWS], gram, device))


def _coded(packing: Stage | None, weight: torch.Tensor, gram: torch.Tensor, device) -> dict[str, float]:
    """Seconds of a weight that is brought into each format that a stage may use, at two bits or near them."""
    if packing is None:
        return {}
    codec, found = packing.codec(), {}
    for name, storages in groupby(packing.storages(), key=lambda storage: storage.format):
        form = codec.form(min(storages, key=lambda storage: abs(storage.rate - 2)), weight.shape[1])
        inputs = codec.inputs(gram, form)
        found[name] = _least(partial(codec.pack, weight, inputs, form), device) / weight.numel()
    return found


def _least(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of a few times; the first one may compile."""
    times = []
    for _ in range(1 + REPEATS):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times[1:])


def forecast_seconds(
    meta: StreamedModel, stages: Sequence[Stage], rates: Rates, text: tuple[int, int], written: int, known: bool,
    trained: int, workers: int,
) -> Seconds:  # fmt: skip
    """meta: the original model. text: windows of calibration, and tokens in each; written: how many of the windows the
    model has yet to write; known: whether their statistics are stored already; trained: tokens that stages train on."""
    tokens, length = text[0] * text[1], text[1]
    forward, sums = flops_per_token(meta.model, length)["total"], _sums_per_token(meta)
    walks = sum(stage.calibration_walks() for stage in stages)
    work = walks * tokens * forward + max(0, 2 * walks - 1) * tokens * sums  # of two walks, each one's and across
    work += ROUNDS * written * length * forward
    if not known:
        work += tokens * (forward + sums)
        if any(stage.needs_sensitivity() for stage in stages):
            groups = min(LAYERS, len(meta.layers)) * 3
            work += min(tokens, TOKENS) * forward * (4 + groups / 2)  # on the way, half of them at a time
    weights = sum(_of_stage(meta, stage, rates) for stage in stages) / workers
    return Seconds(work * rates.products, weights, TRAINED * trained * forward * rates.products)


def _sums_per_token(meta: StreamedModel) -> float:
    """Operations of what a token adds to Gram matrices: one half of each, since they are symmetric."""
    chosen = experts_of_a_token(meta.config.get_text_config(decoder=True)) or 1
    total = 0.0
    for layer in meta.layers:
        total += linear_sums(layer) / SINGLE
        for _, experts in find_experts(layer):
            hidden, inner = shapes_of(experts)["down"]
            total += (1 if is_shared(experts) else chosen) * (hidden**2 + inner**2)
    return total


def _of_stage(meta: StreamedModel, stage: Stage, rates: Rates) -> float:
    """Seconds of a stage's work on all expert matrices."""
    search = max(rates.coded.values(), default=0.0)
    total = 0.0
    for layer in meta.layers:
        for _, experts in find_experts(layer):
            for shape in shapes_of(experts).values():
                one: Effort = stage.effort(shape)
                seconds = one.products * rates.products + one.factors * rates.factors + one.eigen * rates.eigen
                total += expert_count(experts) * (seconds + one.coded * shape[0] * shape[1] * search)
    return total
