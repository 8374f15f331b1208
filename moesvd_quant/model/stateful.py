"""The layer walk for models whose layers hand each other more than hidden states (router states, chosen indices, keys).

Each batch's forward is a greenlet, which stops at every layer until all batches have passed it: the model's own code
carries the state, and still one layer at a time is in memory. What a forward waits with goes to disk where hidden
states do, and its tensors are empty until it goes on.
"""

from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch.utils._pytree import tree_leaves

from ..memory.limits import Batches
from .calls import Patched, StopForward, run
from .folder import ModelError
from .visit import TensorTreeStore, whole


class Forward(greenlet):
    """A forward of one batch that waits at each layer. call: (args, kwargs) of the layer it stands at, `layer`."""

    def __init__(self, model, batch: torch.Tensor):
        super().__init__()
        self.call: tuple | None = None
        self.layer = -1
        self._model, self._batch = model, batch
        self._emptied: list[tuple[torch.Tensor, int]] = []

    def run(self) -> None:
        """What a greenlet does when it is first switched to; an error goes to whoever switched."""
        run(self._model, self._batch)

    @torch.no_grad()  # here and not in `run`: a greenlet that waits would leave its thread as it is within
    def start(self) -> None:
        self.switch()

    @torch.no_grad()
    def answer(self, output: Any) -> None:
        """Goes on to the next layer with what this one gave; after the last one to the end."""
        self.call = None
        self.switch(output)

    def at_layer(self, index: int, args: tuple, kwargs: dict) -> Any:
        """Called within the forward by a patched layer: gives way, and returns what `answer` is given."""
        self.layer, self.call = index, (args, kwargs)
        assert self.parent is not None  # whoever switched here
        return self.parent.switch()

    def given(self) -> list[torch.Tensor]:
        """The tensors of its call."""
        return _tensors(self.call)

    def beside(self) -> list[torch.Tensor]:
        """What else the model's frames hold while it waits: embeddings, masks of other layers."""
        found: dict[int, torch.Tensor] = {}  # several frames hold the same
        frame: FrameType | None = self.gr_frame
        while frame is not None:
            found |= {id(tensor): tensor for tensor in _tensors(dict(frame.f_locals))}  # from Python 3.13 on, a proxy
            frame = frame.f_back
        given = {id(tensor) for tensor in self.given()}
        return [tensor for key, tensor in found.items() if key not in given]

    def empty(self, tensors: list[torch.Tensor], others: set[int]) -> None:
        """Frees these storages, except those (by address) that another owner shares.

        The suspended frames keep the tensor objects; only their storages can be freed."""
        for number, tensor in enumerate(tensors):
            storage = tensor.untyped_storage()
            alone = tensor.is_contiguous() and 0 < storage.nbytes() == tensor.nbytes
            if alone and storage.data_ptr() not in others and storage.resizable():
                self._emptied.append((tensor, number))
                storage.resize_(0)

    def fill(self, copies: list[torch.Tensor]) -> None:
        """Undoes `empty`."""
        while self._emptied:
            tensor, number = self._emptied.pop()
            tensor.untyped_storage().resize_(tensor.nbytes)
            tensor.copy_(copies[number])


class Forwards:
    """Within it, the forwards of all batches stand at one layer: `hidden` and `calls` are what it is called with, kept
    as `like` (which is empty) is. Layers that the user calls meanwhile do their work."""

    def __init__(self, model, layers, batches, like: Batches):
        self.layers, self.like, self.on_disk = layers, like, like.folder is not None
        self._patched = Patched(layers, self._instead)
        self._made = [Forward(model, batch) for batch in batches]
        tensors = [*model.parameters(), *model.buffers(), *batches]
        self._others = _addresses(tensors)

    def __enter__(self) -> "Forwards":
        self._patched.__enter__()
        return self

    def __exit__(self, *_) -> None:
        for forward in self._made:
            if forward.call is not None:  # the walk was left early
                forward.answer(None)
        self._patched.__exit__()

    def start(self) -> None:
        """Takes all to the first layer."""
        self._arrive(self._started(), 0)

    def answer(self, hidden: Batches, beside: TensorTreeStore) -> None:
        """Takes all to the next layer with what this one gave; after the last one to the end."""
        kept = zip(self.hidden, self.calls, self._beside)
        self._arrive(self._answered(zip(hidden, beside), kept), self._made[0].layer + 1)

    def _started(self) -> Iterator[Forward]:
        """The first two are together in memory for a while: what both wait with is the model's, not theirs."""
        for count, forward in enumerate(self._made):
            forward.start()
            if count == 1:
                first, second = (_addresses(f.given() + f.beside()) for f in self._made[:2])
                self._others |= first & second
                yield self._made[0]
            if count or len(self._made) == 1:
                yield forward

    def _answered(self, answers: Iterator, kept: Iterator) -> Iterator[Forward]:
        for forward, answer in zip(self._made, answers):
            if self.on_disk:
                states, (args, kwargs), beside = next(kept)
                forward.fill([states, *_tensors((args, kwargs)), *beside])
            forward.answer(whole(*answer))
            yield forward

    def _arrive(self, forwards: Iterator[Forward], index: int) -> None:
        self.hidden, self.calls, self._beside = self.like.like(), TensorTreeStore(self.like), TensorTreeStore(self.like)
        for forward in forwards:
            if index == len(self.layers):
                continue
            if forward.call is None or forward.layer != index:
                raise ModelError(f"a forward of the model does not call its layer {index}; it cannot be calibrated")
            args, kwargs = forward.call
            self.hidden.append(args[0])
            self.calls.append((args[1:], kwargs))
            if self.on_disk:
                given, beside = forward.given(), forward.beside()
                self._beside.append(beside)
                forward.empty(given + beside, self._others)

    def _instead(self, index, args, kwargs):
        me = getcurrent()
        if not isinstance(me, Forward):
            return type(self.layers[index]).forward(self.layers[index], *args, **kwargs)
        out = me.at_layer(index, args, kwargs)
        if index == len(self.layers) - 1 or out is None:
            raise StopForward
        return out


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _addresses(tensors: Iterable[torch.Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}
