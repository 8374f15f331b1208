"""What a layer sees once the layers before it are compressed: a walk that goes on with what a stage made of each."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from .cache import walk_folder
from .store import Statistics


class CompressedWalk:
    """Takes the windows of `known` statistics through a model folder whose experts are replaced layer by layer, in as
    little memory as those are made in.

    For each layer in order: `statistics(index)`, then `replace` for each of its experts modules.
    """

    def __init__(self, folder: Path, known: Statistics):
        self.known = known
        streamed = known.model(folder)
        self._visits = streamed.walk(known.windows, known.batch_size, known.scratch(known.all_hidden(3)))
        self._own = walk_folder(known.store)

    def statistics(self, index: int) -> dict[str, torch.Tensor]:
        """The sums of `LayerRecorder` for the original layer on the inputs that the compressed ones before it give;
        mapped from a file."""
        self.visit = next(self._visits)
        if self.visit.index != index:
            raise RuntimeError(f"layer {index} was asked for and the walk is at {self.visit.index}; this is a defect")
        path = Path(self._own.name) / "layer.safetensors"
        with torch.no_grad():
            self.known.record(self.visit, path, lambda: self.visit.run(self.visit.hidden))
        found = load_file(path)
        path.unlink()  # it is gone when it is no longer mapped
        return found

    def replace(self, path: str, made: nn.Module) -> None:
        """Puts a copy of what the stage made into the layer that the walk is at."""
        self.visit.put_copy(path, made, self.known.dtype)
