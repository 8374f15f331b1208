"""What a run will need of memory and disk, from shapes alone, before anything is read or computed.

Peaks are of anonymous memory. Every term is a tensor that the code holds; what a term stands for is beside it.
"""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn

from ..calibration.effect import TOKENS, copies_of
from ..calibration.recording import linear_sums
from ..memory.limits import Memory, MemoryLimitError, Sizes, anonymous_bytes
from ..model.experts import all_shapes, expert_count, find_experts
from ..model.stream import StreamedModel
from ..recipe.stage import Stage

SINGLE, DOUBLE = 4, 8
FACTORS = 1.6  # a layer, and what becomes of it
EFFECTS, WORK = "effects of errors on the output", "a layer's decomposition and quantization"
CHECK, CHUNK = 256, 32  # tokens whose predictions verification compares, and how many of them at a time


@dataclass(frozen=True)
class Needs:
    """Bytes. peak: of anonymous memory of one process, by what it is at the time; least: with everything on disk that
    can be; limit: what it may take."""

    peak: dict[str, int]
    least: int
    limit: int
    statistics_disk: int
    hidden_disk: int
    workers: int

    def to_dict(self) -> dict:
        return asdict(self)

    @property
    def memory(self) -> int:
        return max(self.peak.values())

    def describe(self) -> str:
        phase = max(self.peak, key=self.peak.__getitem__)
        each = f" in each of {self.workers} workers" if self.workers > 1 else ""
        return (
            f"memory: {self.memory / 1e9:.2f} GB at most{each} ({phase}), of {self.limit / 1e9:.2f}; "
            f"{self.least / 1e9:.2f} would do; disk beside the checkpoints: {self.statistics_disk / 1e9:.2f} GB of "
            f"statistics, {self.hidden_disk / 1e9:.2f} GB of hidden states while it reads the model"
        )

    def require(self, cache: Path) -> None:
        """MemoryLimitError where memory or the cache's disk cannot hold it, with what would make it fit."""
        if self.least > self.limit:
            fewer = f", or --workers {max(1, self.limit * self.workers // self.least)}" if self.workers > 1 else ""
            raise MemoryLimitError(
                f"memory: {self.least / 1e9:.2f} GB are needed and {self.limit / 1e9:.2f} GB may be taken: the largest "
                f"layer and one expert's statistics do not fit. Give --memory {_rounded_up(self.least * self.workers)}"
                f"{fewer}; a smaller calibration.length helps where batches are what is large"
            )
        cache.mkdir(parents=True, exist_ok=True)
        free, needed = shutil.disk_usage(cache).free, self.statistics_disk + self.hidden_disk
        if needed > free:
            raise MemoryLimitError(
                f"{cache}: {needed / 1e9:.2f} GB of statistics and hidden states are to come and {free / 1e9:.2f} GB "
                "are free; set MOESVD_CACHE to a larger disk, or use fewer calibration.samples"
            )


def forecast(
    meta: StreamedModel,
    sizes: Sizes,
    tokens: int,
    statistics,
    memory: Memory,
    workers: int,
    stages: Sequence[Stage],
) -> Needs:
    """meta: the original model; sizes: of its walk; tokens: of calibration; statistics: their store."""
    base = anonymous_bytes()
    layers = [_layer(layer, sizes.item) for layer in meta.layers]
    embeddings, head = (sizes.item * m.weight.numel() for m in _ends(meta))
    predictions = meta.model.get_output_embeddings().weight.shape[0] * (2 * CHECK * SINGLE + 4 * CHUNK * DOUBLE)
    grams, each = max(layer.grams for layer in layers), max(layer.each for layer in layers)
    walked, loading = max(layer.walked for layer in layers), max(layer.loading for layer in layers)
    stored, work = max(layer.stored for layer in layers), max(layer.work for layer in layers)
    reading = base + walked + sizes.activations
    room = memory.limit - reading
    at_once = max(each, min(grams, room // each * each)) if each else 0
    hidden = 2 * tokens * sizes.row
    in_memory = hidden if room > hidden + sizes.layer else 0
    walks = max(stage.calibration_walks() for stage in stages)
    # A stage that walks beside its work has the walks' layers as well, sums of as many experts as fit, and hidden
    # states, of which each walk has two and what its experts were given.
    worked = base + (stored + walks * walked if walks else int(FACTORS * stored))
    sums, seen = walks * grams, 4 * walks * tokens * sizes.row
    sums = sums if worked + sizes.activations + sums < memory.limit else walks * each
    seen = seen if worked + seen + 2 * sizes.layer < memory.limit else 0
    walking = sizes.activations if walks else 0
    peak = {
        "embeddings": base + embeddings + in_memory // 2,
        "reading the model": max(base + loading, reading + at_once) + in_memory,
        WORK: worked + max(work, sums, walking) + seen,
        "verification": base + max(loading, head + predictions),
    }
    least = {
        **peak,
        "reading the model": max(base + loading, reading + each),
        WORK: worked + max(work, walks * each, walking),
    }
    sensitive = any(stage.needs_sensitivity() for stage in stages)
    weighed = copies_of(meta) * min(tokens, TOKENS) * sizes.row if sensitive else 0
    if weighed:  # rounded weights lie beside what they were
        peak[EFFECTS] = least[EFFECTS] = reading + max(layer.bank for layer in layers)
    kept = statistics.needed if statistics.stored and not statistics.complete() else 0
    spilled = 0 if statistics.complete() or in_memory else hidden + (hidden // 2 if at_once < grams else 0)
    return Needs(peak, max(least.values()), memory.limit, kept, max(spilled, weighed), workers)


@dataclass(frozen=True)
class _Layer:
    loading: int  # at the highest point of reading it in the walk's precision
    walked: int  # its weights then, and the Gram matrices of its other linears
    grams: int  # of all its experts
    each: int  # of one expert
    bank: int  # of one projection of all experts
    stored: int  # its weights, in the stored precision
    work: int  # the working set of its largest matrix


def _layer(layer: nn.Module, item: int) -> _Layer:
    """item: bytes of a weight in the walk."""
    count = sum(p.numel() for p in layer.parameters())
    largest = max(p.numel() for p in layer.parameters())
    linears = linear_sums(layer)
    each = grams = work = bank = 0
    for _, experts in find_experts(layer):
        shapes = all_shapes(experts)
        hidden, inner = shapes["down"]
        one = SINGLE * (hidden**2 + inner**2)
        each, grams = max(each, one), grams + one * expert_count(experts)
        work = max(work, *(_working_set(*shape) for shape in shapes.values()))
        bank = max(bank, *(item * expert_count(experts) * out * columns for out, columns in shapes.values()))
    loading = item * max(count, 2 * largest)  # parts and their whole, side by side
    stored = next(layer.parameters()).dtype.itemsize * count
    return _Layer(loading, item * count + linears, grams, each, bank, stored, work)


def _working_set(out: int, columns: int) -> int:
    """The pooled Gram matrix, the expert's own with its blend, and both sides of a product in double precision."""
    return columns**2 * (4 * SINGLE + DOUBLE) + 4 * DOUBLE * out * columns + 3 * DOUBLE * min(out, columns) ** 2


def _ends(meta: StreamedModel):
    return meta.model.get_input_embeddings(), meta.model.get_output_embeddings()


def _rounded_up(size: int) -> str:
    return f"{-(-size // 10**8) / 10:.1f}GB"
