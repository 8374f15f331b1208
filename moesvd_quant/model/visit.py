"""A decoder layer that the walk is at."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from ..memory.limits import Batches


class TensorTreeStore:
    """Nested tuples and dicts with tensors in them, one per batch, kept as `like` keeps tensors."""

    def __init__(self, like: Batches):
        self._tensors = like.like()
        self._values: list = []

    def append(self, value: Any) -> None:
        self._values.append(tree_map_only(torch.Tensor, self._put, value))

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: int) -> Any:
        return tree_map_only(_Place, lambda place: self._tensors[place.index], self._values[index])

    def __iter__(self) -> Iterator:
        return (self[index] for index in range(len(self)))

    def _put(self, tensor: torch.Tensor) -> "_Place":
        self._tensors.append(tensor)
        return _Place(len(self._tensors) - 1)


@dataclass(frozen=True)
class _Place:
    index: int


class LayerVisit:
    """A decoder layer with its weights, and the inputs that the walk has for it.

    calls: per batch, the arguments (args, kwargs) other than the hidden states. passes_state: keep the layer's extra
    outputs of every batch (models that hand state from layer to layer), or of the first batch only.
    """

    def __init__(
        self, index: int, layer: nn.Module, hidden: Batches, calls: Sequence | TensorTreeStore, passes_state=False
    ):
        self.index, self.layer, self.hidden, self.calls, self.passes_state = index, layer, hidden, calls, passes_state
        self.beside = TensorTreeStore(hidden)
        self._outputs: Batches | None = None

    def outputs(self) -> Batches:
        """Output hidden states of every batch; run once, so that hooks set before see each batch once."""
        if self._outputs is None:
            self._outputs = self.hidden.like()
            for out in self._run(self.hidden):
                if self.passes_state or not len(self.beside):
                    self.beside.append(out[1:] if isinstance(out, tuple) else None)
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


def whole(hidden: torch.Tensor, beside: tuple | None):
    """What a layer returns: hidden states, with what goes `beside` them if it returns a tuple."""
    return hidden if beside is None else (hidden, *beside)
