"""What tensor parallelism costs, by counting (MoE-SVD, appendix B.4): products are split, what lies between is sent.

The paper's own example is a hundred times off (docs/papers.md); its volumes are right and are those used here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..model.experts import find_experts, is_shared, shapes_of
from ..runtime.factorized_experts import FactorizedExperts
from ..runtime.parts import FactorPart
from .flops import expert_macs
from .random_model import describe_model, uniform_layout
from .table import Table


@dataclass(frozen=True)
class Device:
    """One of the devices: operations per second, bytes per second of its link."""

    flops: float
    bandwidth: float


@dataclass(frozen=True)
class Cost:
    """Of some tokens: multiply-adds in all devices together, and numbers of item_bytes that are sent."""

    macs: float
    sent: float
    item_bytes: int

    def computing(self, device: Device, degree: int) -> float:
        """Seconds, with two operations for each multiply-add, split evenly."""
        return 2 * self.macs / degree / device.flops

    def sending(self, device: Device) -> float:
        """Seconds, each number once. A ring sends 2 (p - 1) / p of that, before factorization and after."""
        return self.sent * self.item_bytes / device.bandwidth


def product_cost(shape: tuple[int, int], tokens: int, rank: int | None, item_bytes: int) -> Cost:
    """Of one matrix (out, in), whole or in two factors: B out in and B out; or B r (out + in) and B (r + out)."""
    out, columns = shape
    if rank is None:
        return Cost(tokens * out * columns, tokens * out, item_bytes)
    return Cost(tokens * rank * (out + columns), tokens * (rank + out), item_bytes)


def experts_cost(model: nn.Module, tokens: int) -> Cost:
    """Of all experts of a model (it may be on the meta device).

    gate and up are split by rows and down by columns, so that a module sends its output alone; of each factorized
    matrix that a token meets, what lies between its factors is sent as well: once where all experts share the right
    factor.
    """
    top_k = getattr(model.config, "num_experts_per_tok", 0)
    macs = sent = 0.0
    for _, experts in find_experts(model):
        chosen = 1 if is_shared(experts) else top_k
        macs += expert_macs(experts, chosen)
        sent += shapes_of(experts)["down"][0] + _between(experts, chosen)
    return Cost(tokens * macs, tokens * sent, next(model.parameters()).element_size())


def _between(experts: nn.Module, chosen: int) -> float:
    """Numbers between the factors of the matrices that a token meets."""
    if not isinstance(experts, FactorizedExperts):
        return 0
    total = 0.0
    for name, parts in experts.layout.items():
        for part in parts:
            if isinstance(part, FactorPart):
                once = experts.shared_input(part) == "right" and name != "down"
                total += part.rank * (1 if once else chosen * len(part.experts) / experts.experts)
    return total


def tensor_parallel_table(
    folders: Sequence[Path], ratios: Sequence[float], batches: Sequence[int], degree: int, device: Device
) -> Table:
    """A row for each model and batch: the first one, those beside it, and the first factorized by each ratio."""
    models = {folder.name: describe_model(folder) for folder in folders}
    first = folders[0]
    for ratio in ratios:
        models[f"{first.name}, {ratio:g} removed"] = describe_model(first, uniform_layout(first, ratio))
    rows: list[list[str | float]] = []
    for tokens in batches:
        whole = 0.0
        for name, model in models.items():
            cost = experts_cost(model, tokens)
            computing, sending = cost.computing(device, degree), cost.sending(device)
            whole = whole or computing + sending
            figures = (cost.macs / tokens / 1e9, 1e3 * computing, 1e3 * sending, whole / (computing + sending))
            rows.append([name, tokens, *[float(f"{value:.4g}") for value in figures]])
    columns = ["model", "tokens", "GMAC per token", "computing ms", "sending ms", "x"]
    title = (
        f"Experts on {degree} devices of {device.flops / 1e12:g} TFLOP/s and {device.bandwidth / 1e9:g} GB/s, counted: "
        "no latency, no imbalance"
    )
    return Table(title, columns, rows)
