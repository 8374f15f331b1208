"""Predictions of the original, which the models compared with it share: it is walked once for each text."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ..model.stream import StreamedModel, precision_on
from .opening import Report, streamed

BATCH_TOKENS = 2048  # at a time: logits of a large vocabulary are much larger than hidden states
KEPT = 8  # texts whose hidden states stay on the disk

# Walks that are over, the oldest one first. A bench compares every checkpoint with the same original on the same texts.
_walked: dict[tuple, StreamedModel] = {}


def original_predictions(original: Path, windows: torch.Tensor, device: str, report: Report) -> Iterator[torch.Tensor]:
    """Logits (batch, length, vocabulary) of a model for token windows (n, length), int64, batch by batch.

    One layer is in memory, and then the output head. What the last layer gave stays on the disk until this process
    ends, or KEPT other texts were walked over; logits, which are vocabulary / width times larger, are made of it anew.
    report: is told of each layer of a walk.
    """
    from ..calibration.store import fingerprint

    key = (fingerprint(original), tuple(windows.shape), hashlib.sha256(windows.numpy().tobytes()).digest(), device)
    if key not in _walked:
        while len(_walked) >= KEPT:
            del _walked[next(iter(_walked))]
        model = streamed(original, precision_on(device), device, report)
        walk_over(model, windows)
        _walked[key] = model
    return _walked[key].predictions()


def walk_over(model: StreamedModel, windows: torch.Tensor) -> None:
    """Takes windows (n, length) through the layers of a model, after which its `predictions` can be asked for, more
    than once. Its hidden states are in a file without a name: those of two models may not fit in memory."""
    at_once = max(1, BATCH_TOKENS // windows.shape[1])
    with TemporaryDirectory() as scratch:  # the file needs no folder once it is open
        for _ in model.walk(windows, at_once, Path(scratch)):
            pass
