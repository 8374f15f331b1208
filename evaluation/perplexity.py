"""Token perplexity by a named protocol."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

PROTOCOL = "whole text, non-overlapping windows, token level, the first token of a window is not predicted"


@dataclass(frozen=True)
class Perplexity:
    ppl: float
    nll: float  # nats per predicted token
    tokens: int  # predicted tokens
    windows: int
    length: int

    def to_dict(self) -> dict:
        return asdict(self)


@torch.no_grad()
def perplexity(
    model,
    windows: torch.Tensor,
    batch_size: int = 8,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Perplexity:
    """Perplexity of a causal model over token windows (n, length), int64.

    Losses are float32, summed in float64 window by window, so that the batch size does not matter.
    ValueError names the first window whose loss is not finite.
    """
    device = next(model.parameters()).device
    total, done = 0.0, 0
    for batch in windows.split(batch_size):
        batch = batch.to(device)
        logits = model(input_ids=batch, use_cache=False).logits
        for row, ids in zip(logits, batch):
            loss = float(F.cross_entropy(row[:-1].float(), ids[1:], reduction="none").double().sum())
            if not math.isfinite(loss):
                raise ValueError(f"window {done}: the loss is {loss}; the checkpoint is broken or overflows")
            total += loss
            done += 1
        progress(done, len(windows))
    count, length = windows.shape
    tokens = count * (length - 1)
    return Perplexity(_exp(total / tokens), total / tokens, tokens, count, length)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
