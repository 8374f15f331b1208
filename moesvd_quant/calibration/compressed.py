"""What a layer sees once the layers before it are compressed: a walk that goes on with what a stage made of each."""

import copy

import torch
from torch import nn

from ..model.stream import StreamedModel
from .statistics import LayerRecorder
from .store import BATCH_SIZE


class CompressedWalk:
    """Takes windows (n, length) through a model whose experts are replaced layer by layer.

    For each layer in order: `statistics(index)`, then `replace` for each of its experts modules.
    """

    def __init__(self, folder, dtype: torch.dtype | None, device, windows: torch.Tensor):
        self.dtype = dtype
        self._visits = StreamedModel(folder, dtype, device).walk(windows, BATCH_SIZE)

    def statistics(self, index: int) -> dict[str, torch.Tensor]:
        """The sums of `LayerRecorder` for the original layer on the inputs that the compressed ones before it give."""
        self._visit = next(self._visits)
        if self._visit.index != index:
            raise RuntimeError(f"layer {index} was asked for and the walk is at {self._visit.index}; this is a defect")
        recorder = LayerRecorder(self._visit.layer)
        with torch.no_grad():
            self._visit.run(self._visit.hidden)
        return {name: tensor.cpu() for name, tensor in recorder.detach().items()}

    def replace(self, path: str, made: nn.Module) -> None:
        """Puts a copy of what the stage made into the layer that the walk is at."""
        self._visit.layer.set_submodule(path, copy.deepcopy(made).to(self.dtype))
