"""A decoder layer that the walk is at."""

import copy
from collections.abc import Iterator

import torch
from torch import nn

from ..memory import Batches


class LayerVisit:
    """A decoder layer with its weights, and the inputs that the walk has for it.

    calls: per batch, the arguments beside the hidden states; keep: whether all that the layer returns is kept.
    """

    def __init__(self, index: int, layer: nn.Module, hidden: Batches, calls: list, keep: bool = False):
        self.index, self.layer, self.hidden, self.calls, self.keep = index, layer, hidden, calls, keep
        self.whole: list = []  # what the layer returned, with state if it hands on any; of the first batch, or of all
        self._outputs: Batches | None = None

    def outputs(self) -> Batches:
        """Output hidden states of every batch; run once, so that hooks set before see each batch once."""
        if self._outputs is None:
            self._outputs = self.hidden.like()
            for out in self._run(self.hidden):
                if self.keep or not self.whole:
                    self.whole.append(out)
                self._outputs.append(_hidden(out))
        return self._outputs

    def run(self, hidden: Batches) -> Batches:
        """Output hidden states of the layer for these input ones, a tensor per batch of the walk."""
        made = hidden.like()
        for out in self._run(hidden):
            made.append(_hidden(out))
        return made

    def run_batch(self, layer: nn.Module, batch: int) -> torch.Tensor:
        """What a layer that stands in for this one puts out for one batch of the walk."""
        args, kwargs = self.calls[batch]
        return _hidden(layer(self.hidden[batch], *args, **kwargs))

    def put_copy(self, path: str, made: nn.Module, dtype: torch.dtype | None) -> None:
        """From now on a copy of a module, in the precision of the walk (None: its own), works at this path."""
        self.layer.set_submodule(path, copy.deepcopy(made).to(dtype))

    def _run(self, hidden: Batches) -> Iterator:
        return (self.layer(states, *args, **kwargs) for states, (args, kwargs) in zip(hidden, self.calls))


def _hidden(out):
    return out[0] if isinstance(out, tuple) else out
