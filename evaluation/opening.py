"""A model as it is measured: in memory where it fits, else one layer at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import UsageError
from ..model.stream import Precision
from .inputs import EvalSpec
from .memory import fits
from .perplexity import Logits, in_memory

Report = Callable[[str, int, int], None]  # what, done, total


@dataclass(frozen=True)
class Measured:
    """A model that is opened."""

    logits: Logits
    model: torch.nn.Module | None  # None where it streams
    described: torch.nn.Module  # the modules, on the meta device where it streams
    stored_dtype: torch.dtype  # of most weights on disk


def open_model(folder: Path, wanted: EvalSpec, device: str, progress: Report) -> Measured:
    """UsageError for tasks on a model that has to stream."""
    import moesvd_quant

    from ..model.opened import open_folder
    from ..model.stream import precision_on

    dtype, stored = precision_on(device), open_folder(folder).dtype
    if _streams(folder, wanted, device):
        require_room(folder, wanted, device)
        made = streamed(folder, dtype, device, progress)
        return Measured(made.logits, None, made.model, stored)
    model = moesvd_quant.load(folder, dtype or "auto").to(device)
    return Measured(in_memory(model), model, model, stored)


def _streams(folder: Path, wanted: EvalSpec, device: str) -> bool:
    return wanted.stream if wanted.stream is not None else not fits(folder, device)


def require_room(folder: Path, wanted: EvalSpec, device: str) -> None:
    """UsageError for tasks on a model that has to stream."""
    if wanted.tasks and _streams(folder, wanted, device):
        raise UsageError(f"{folder}: tasks need the whole model in memory; perplexity alone can stream")


def streamed(folder: Path, dtype: Precision, device: str, progress: Report | None = None):
    """A StreamedModel that reports each layer it reads."""
    from ..model.stream import StreamedModel

    class Reporting(StreamedModel):
        def load_layer(self, index: int):
            layer = super().load_layer(index)
            if progress:
                progress("layers", index + 1, len(self.layer_names))
            return layer

    return Reporting(folder, dtype, device)
