"""Healed layers as they will ship: rounded to the stored dtype, judged by the loss on held-out windows."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from ..model.stream import StreamedModel
from ..runtime.parts import Layout
from .adapters import Updates, apply
from .losses import next_token
from .terms import into_layout

BATCH = 8


def layer_seed(seed: int, index: int) -> int:
    """What the fresh right factors and adapters of a layer are drawn by."""
    return seed * 100_003 + index


def heal_layer(streamed: StreamedModel, index: int, layer: nn.Module, layout: Layout, updates: Updates, seed: int):
    """Brings a loaded layer of the parent to the layout and merges its updates, each rounded to its dtype on disk."""
    name = streamed.layer_names[index]
    into_layout(layer, name, layout, streamed.dtype, layer_seed(seed, index))
    apply(layer, name + ".", updates, streamed.dtype_on_disk)


def validation_loss(streamed: StreamedModel, windows: torch.Tensor, heal=None, scratch: Path | None = None) -> float:
    """Mean next-token loss on windows (n, length), one layer in memory; `heal(index, layer)` changes it first.

    scratch: folder for hidden states, memory where it is None.
    """
    for visit in streamed.walk(windows, BATCH, scratch):
        if heal:
            heal(visit.index, visit.layer)
    return hidden_loss(streamed, streamed.hidden, windows)


@torch.no_grad()
def hidden_loss(streamed: StreamedModel, hidden: Iterable[torch.Tensor], windows: torch.Tensor) -> float:
    """Mean next-token loss of windows whose last hidden states are these, a tensor per batch of BATCH windows."""
    total = 0.0
    with streamed.output():
        for states, ids in zip(hidden, streamed.batches):
            total += float(next_token(streamed.head(states, ids), ids).double()) * len(ids)
    return total / len(windows)
