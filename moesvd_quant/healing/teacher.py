"""What the original predicts on windows of text, while it is not in memory.

Its layers are walked through once, one at a time. What the last of them puts out lies on disk, and the model's own end
(norm, output head and whatever else it does there) makes predictions of it when they are asked for.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..model.stream import StreamedModel
from .shipped import BATCH

Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@contextmanager
def predictions(
    original: StreamedModel, windows: torch.Tensor, scratch: Path, progress: Callable[[int, int], None]
) -> Iterator[Predict]:
    """Within it, predict(numbers (n,), their token ids (n, length)) gives the original's logits (n, length, vocabulary)
    on these of the windows (count, length).

    scratch: folder whose disk takes the hidden states of all windows, twice while the walk is under way.
    """
    for visit in original.walk(windows, BATCH, scratch):
        progress(visit.index + 1, len(original.layer_names))
    states = original.hidden.like()  # window by window: training draws them in another order
    for batch in original.hidden:
        for window in batch.split(1):
            states.append(window)
    original.hidden = states

    @torch.no_grad()
    def predict(numbers: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return original.head(torch.cat([states[number] for number in numbers.tolist()]), ids)

    with original.output():
        yield predict
