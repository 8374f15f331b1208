"""Truncation rehearsed: what the planned ranks do to the loss on a few thousand tokens, with nothing written.

All ratios go through the layers together, so that every layer is read, and every expert factorized, once per text.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F

from ..calibration.metric import blend, shrink
from ..calibration.store import EFFECT_BATCH, Statistics
from ..decompose.whitening import whitened_directions
from ..memory.limits import Batches
from ..model.experts import dense_weight, expert_count, find_experts, shapes_of, split_projections
from ..model.stream import StreamedModel
from ..planning.choices import row_scale
from ..planning.context import Plan, expert_grams, reached
from ..runtime.parts import JOINT

TOKENS = 16384  # of a text

Factors = list[tuple[torch.Tensor, torch.Tensor]]  # of each expert at full rank, best direction first


@torch.no_grad()
def rehearse(
    streamed: StreamedModel,
    windows: torch.Tensor,
    calibration: Statistics,
    plans: dict[float, Plan],
    scratch: Path | None = None,
) -> dict[float, float]:
    """{ratio: rise of the loss, nats per predicted token} on the first TOKENS of windows (n, length) int64.

    Experts are truncated as the plan of stage `svd` for each ratio says, under the calibration's metric.
    """
    windows = windows[: max(1, TOKENS // windows.shape[1])]
    variants: dict[float, Batches] = {}
    for visit, statistics in zip(streamed.walk(windows, EFFECT_BATCH, scratch), calibration.layers()):
        name, first = streamed.layer_names[visit.index], next(iter(plans.values()))
        factors = _all_factors(visit.layer, statistics, first, name, streamed.device, blend)
        here = {}
        for ratio, plan in plans.items():
            with _truncated(visit.layer, factors, {p: plan.layout.experts[f"{name}.{p}"] for p in factors}):
                here[ratio] = visit.run(variants.get(ratio, visit.hidden))
        variants = here
    return _rises(streamed, variants)


@torch.no_grad()
def rehearse_alone(
    streamed: StreamedModel,
    windows: torch.Tensor,
    calibration: Statistics,
    plans: dict[float, Plan],
    scratch: Path | None = None,
) -> dict[float, dict[int, float]]:
    """{ratio: {layer: rise of the loss, nats per predicted token}} where the experts of one layer alone are truncated,
    by the plan for that ratio (MoE-SVD, Figures 1 left and 7). Layers without experts that text reaches are left out.

    All variants go through the layers in one walk: that of layer l leaves the original's path there.
    """
    windows = windows[: max(1, TOKENS // windows.shape[1])]
    variants: dict[tuple[float, int], Batches] = {}
    for visit, statistics in zip(streamed.walk(windows, EFFECT_BATCH, scratch), calibration.layers()):
        name, first = streamed.layer_names[visit.index], next(iter(plans.values()))
        variants = {key: visit.run(hidden) for key, hidden in variants.items()}
        if factors := _all_factors(visit.layer, statistics, first, name, streamed.device, shrink):
            for ratio, plan in plans.items():
                with _truncated(visit.layer, factors, {p: plan.layout.experts[f"{name}.{p}"] for p in factors}):
                    variants[ratio, visit.index] = visit.run(visit.hidden)
    rises = _rises(streamed, variants)
    return {ratio: {at: rise for (own, at), rise in rises.items() if own == ratio} for ratio in plans}


def _rises(streamed: StreamedModel, variants: dict) -> dict:
    """How much higher the loss is after each variant's last hidden states, {its key: nats}; after a walk."""
    with streamed.output():
        before = _loss(streamed, streamed.hidden)
        return {key: _loss(streamed, hidden) - before for key, hidden in variants.items()}


def _all_factors(layer, statistics: dict, plan: Plan, name: str, device, metric) -> dict[str, dict[str, Factors]]:
    """Factors of all experts of a layer that text reaches, by path and projection of the plan's layout; under `blend`,
    as stage svd has it for `global`, or `shrink`, as for published methods."""
    return {
        path: _factors(experts, statistics, path, plan, f"{name}.{path}", device, metric)
        for path, experts in find_experts(layer)
        if reached(statistics, path)
    }


def _factors(experts, statistics: dict, path: str, plan: Plan, full: str, device, metric) -> dict[str, Factors]:
    """{projection of the plan's layout: factors at full rank of each expert}."""
    metrics = expert_grams(statistics, path, device, metric)
    found: dict[str, Factors] = {}
    for name in plan.layout.experts[full]:
        scale = row_scale(plan.decisions[full]["price"], name, shapes_of(experts)).to(device)
        found[name] = []
        for expert in range(expert_count(experts)):
            weight = dense_weight(experts, name, expert, torch.float32) * scale
            _, left, right = whitened_directions(weight, metrics[name][expert], min(weight.shape))
            found[name].append(((left / scale).float(), right.float()))
    return found


@contextmanager
def _truncated(layer, factors: dict[str, dict[str, Factors]], layouts: dict[str, dict]) -> Iterator[None]:
    views = {path: split_projections(layer.get_submodule(path)) for path in factors}
    kept = {path: {name: w.clone() for name, w in own.items()} for path, own in views.items()}
    for path, projections in layouts.items():
        for name, parts in projections.items():
            ranks = {e: part.rank for part in parts for e in part.experts}
            for expert, (left, right) in enumerate(factors[path][name]):
                rank = ranks.get(expert, 0)
                if rank is None:  # dense
                    continue
                made = left[:, :rank] @ right[:rank]
                names = ("gate", "up") if name == JOINT else (name,)
                for own, rows in zip(names, made.chunk(len(names))):
                    views[path][own][expert].copy_(rows)
    try:
        yield
    finally:
        for path, own in views.items():
            for name, weights in own.items():
                weights.copy_(kept[path][name])


def _loss(streamed: StreamedModel, hidden: Batches) -> float:
    """Mean loss on the next token, over all windows of the walk."""
    total, count = 0.0, 0
    for states, batch in zip(hidden, streamed.batches):
        logits = streamed.head(states, batch)[:, :-1].float()
        total += float(F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").double())
        count += batch[:, 1:].numel()
    return total / count
