"""What the original predicts on windows of text, while it is not in memory.

Its layers are walked through once, one at a time. What the last of them puts out lies on disk, and the model's own end
(norm, output head and whatever else it does there) makes predictions of it when they are asked for.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..memory.limits import Batches
from ..model.stream import StreamedModel
from .rounding import BATCH

WINDOWS = 1024  # that go through the layers together: fewer read the model more often, more want a larger disk

Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@contextmanager
def predictions(
    original: StreamedModel, windows: torch.Tensor, scratch: Path, progress: Callable[[int, int], None]
) -> Iterator[Predict]:
    """Within it, predict(numbers (n,), their token ids (n, length)) gives the original's logits (n, length, vocabulary)
    on these of the windows (count, length).

    scratch: folder whose disk takes the hidden states (`disk_bytes`).
    """
    parts, states = windows.split(WINDOWS), Batches(scratch, original.device)
    total = len(parts) * len(original.layer_names)
    for done, part in enumerate(parts):
        for visit in original.walk(part, BATCH, scratch):
            progress(done * len(original.layer_names) + visit.index + 1, total)
        for batch in original.hidden:
            for window in batch.split(1):  # training draws them in another order
                states.append(window)
    original.hidden = states

    @torch.no_grad()
    def predict(numbers: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return original.head(torch.cat([states[number] for number in numbers.tolist()]), ids)

    with original.output():
        yield predict


def disk_bytes(windows: int, window: int) -> int:
    """Of hidden states while the walk is under way: `window` bytes for each of the windows; for those that are in the
    layers twice more."""
    return window * (windows + 2 * min(windows, WINDOWS))
