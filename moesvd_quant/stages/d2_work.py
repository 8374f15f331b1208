"""The work of stage `d2`."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch

from ..calibration.metric import shrink
from ..decompose.bases import regmean, ties
from ..decompose.deltas import merge_base, share_deltas
from ..decompose.pruning import (
    channel_scores,
    kept_channels,
    output_energy,
    token_choice,
)
from ..decompose.whitening import whitened_svd
from ..memory.lazy import LazySequence
from ..model.experts import find_experts, split_projections
from ..planning.context import (
    Context,
    Plan,
    errors_of,
    expert_grams,
    factorized,
    weak_experts,
)
from ..runtime.parts import DensePart, Projections
from .d2 import D2


def prepare(context: Context, options: D2, plan: Plan, folder: Path) -> Plan:
    """Bases by Fisher information take a pass of their own over all layers."""
    if options.merge == "fisher":
        context.statistics.measure_fisher("fisher", context.progress)
    return plan


def run_layer(context: Context, options: D2, index: int, layer, statistics: dict, plan: Plan) -> dict:
    """Replaces the experts of a loaded layer as planned. Returns errors per projection and expert."""
    report = {}
    for path, native in list(find_experts(layer)):
        full = f"{context.parent.layer_names[index]}.{path}"
        grams = expert_grams(statistics, path, context.device, shrink)
        weights, tokens = split_projections(native), statistics[f"{path}/tokens"]
        layout = plan.layout.experts[full]
        bases = {name: _base(context, options, full, name, weights[name], grams[name], tokens) for name in layout}
        channels = _channels(bases, layout, statistics, path)
        banks = (
            (f"{name}_{bank}", row, value)
            for name, parts in layout.items()
            for bank, row, value in _banks(parts, weights[name], bases[name], grams[name], channels, options)
        )
        made = factorized(native, layout, chain(((key, None, value) for key, value in channels.items()), banks))
        layer.set_submodule(path, made)
        report[full] = errors_of(made, weights, grams) | {"weak_experts": weak_experts(statistics, path)}
    return report


def _banks(parts, weights, base, grams, channels, options) -> Iterator[tuple[str, int | None, torch.Tensor]]:
    """(bank, row or None for all, tensor) of one projection, whose parts are a base and then its deltas."""
    stored, held = _pruned_base(base, parts[0], channels.get("channels"))
    yield "0_dense", 0, stored
    # Deltas stand for what the base that is stored leaves over.
    rest = LazySequence(len(weights), lambda expert: weights[expert].double() - held)
    for i, part in enumerate(parts[1:], 1):
        if options.shared_v:
            left, right = share_deltas(rest, grams, part.rank)
            yield from ((f"{i}_left", None, left), (f"{i}_right", None, right))
            continue
        for row, expert in enumerate(part.experts):
            left, right = whitened_svd(rest[expert], grams[expert], part.rank)
            yield from ((f"{i}_left", row, left), (f"{i}_right", row, right))


def _base(context: Context, options: D2, full: str, name: str, weights, grams, tokens) -> torch.Tensor:
    if options.merge == "fisher":
        return context.statistics.by_fisher("fisher", full)[name].to(weights.device).double()
    if options.merge == "regmean":
        return regmean(weights, grams)
    if options.merge == "ties":
        return ties(weights, tokens)
    importance = tokens.double() if options.merge == "frequency" else torch.ones(len(weights))
    return merge_base(weights, importance.to(weights.device))


def _pruned_base(
    base: torch.Tensor, part: DensePart, channels: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The base as it is stored, and the same at full size with zeros."""
    axis = 0 if part.rows else 1
    if channels is None:
        return base, base
    stored = base.index_select(axis, channels.to(base.device))
    return stored, torch.zeros_like(base).index_copy(axis, channels.long().to(base.device), stored)


def _channels(bases: dict, layout: Projections, statistics: dict, path: str) -> dict[str, torch.Tensor]:
    """The tensors of `factorized_experts.channel_tensors`, int32; none where the base is not pruned."""
    down = layout["down"][0]
    if down.columns is None:
        return {}
    tokens = int(statistics[f"{path}/tokens"].sum())
    gram_in, gram_mid = (sum(gram.double() for gram in statistics[f"{path}/{key}"]) for key in ("gram_in", "gram_mid"))
    wide = bases["down"].cpu()
    scores = channel_scores(gram_mid.diagonal() / tokens, wide)
    kept = kept_channels(scores, down.columns)
    if down.dynamic is None:
        return {"channels": kept.int()}
    up_energy = output_energy(bases["up"].cpu()[kept], gram_in, tokens) if "gate" in bases else torch.ones(len(kept))
    prior, weight = token_choice(scores[kept], wide[:, kept], up_energy)
    return {
        "channels": kept.int(),
        "channel_prior": prior.view(torch.int32),
        "channel_weight": weight.view(torch.int32),
    }
