"""The walk through a model: all batches through one decoder layer, then the next.

The same walk serves calibration, decomposition, quantization and verification.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..memory.limits import Batches
from .calls import StatePassedOn, finish, head_input, record, without_embeddings
from .folder import ModelError
from .layered import LayeredModel, Precision
from .stateful import Forwards
from .visit import LayerVisit

PREDICTED = 2**22  # logits in memory at a time, where those of a text are gone through


def precision_on(device: torch.device | str) -> Precision:
    """Of the weights in a walk: float32 on a CPU, elsewhere as transformers loads them."""
    return torch.float32 if str(device) == "cpu" else "auto"


class StreamedModel(LayeredModel):
    """A model whose layers are walked through.

    After a walk, `hidden` are what the last layer gave, a tensor for each of `batches`; `stateful` tells whether layers
    handed each other more than hidden states.
    """

    stateful = False

    def _load_around(self, without: str) -> None:
        """All that is not a decoder layer, but the module `without`."""
        self.load(*(prefix for prefix in self.outer_prefixes() if prefix != f"{without}."))

    @torch.no_grad()
    def walk(self, windows: torch.Tensor, batch_size: int = 8, scratch: Path | None = None) -> Iterator[LayerVisit]:
        """Takes token windows (n, length) through the model breadth-first: all batches through one layer,
        then the next. Yields a visit per layer with its weights in memory; hidden states advance after it.

        scratch: folder of the disk that hidden states go to; in memory where it is None. After the walk, `hidden` are
        those the last layer gave, and neither embeddings nor output head are in memory.
        """
        embeddings, head = self._embeddings()
        self._load_around(head)
        self.batches = windows.to(self.device).split(batch_size)
        try:
            hidden, calls = record(self.model, self.layers, self.batches, Batches(scratch, self.device))
        except StatePassedOn:
            yield from self._walk_with_state(embeddings, scratch)
            return
        if idle := [name for name, called in zip(self.layer_names, calls) if not called]:
            raise ModelError(f"{self.folder}: a forward of the model does not call {idle[0]}; it cannot be calibrated")
        self.drop(embeddings)
        for index in range(len(self.layer_names)):
            layer = self.load_layer(index)
            visit = LayerVisit(index, layer, hidden, calls[index])
            yield visit
            hidden = visit.outputs()
            calls[index] = []
            self.drop_layer(index)
        self.hidden, self.beside = hidden, visit.beside[0]

    def _walk_with_state(self, embeddings: str, scratch: Path | None) -> Iterator[LayerVisit]:
        """The same where layers hand each other more than hidden states; all of it goes to `scratch`."""
        self.stateful = True
        with Forwards(self.model, self.layers, self.batches, Batches(scratch, self.device)) as forwards:
            forwards.start()
            self.drop(embeddings)
            for index in range(len(self.layer_names)):
                layer = self.load_layer(index)
                visit = LayerVisit(index, layer, forwards.hidden, forwards.calls, passes_state=True)
                yield visit
                forwards.answer(visit.outputs(), visit.beside)
                self.hidden, self.beside = visit.outputs(), visit.beside[0]
                self.drop_layer(index)

    @contextmanager
    def output(self) -> Iterator[None]:
        """Within it, after a walk, `head` can be used: the output head is in memory."""
        embeddings, head = self._embeddings()
        self.load(f"{embeddings}." if self.is_tied(f"{head}.weight") else f"{head}.")
        self.model.tie_weights()
        if self._embeddings_follow():
            self.load(f"{embeddings}.")
        try:
            yield
        finally:
            self.drop(embeddings)
            self.drop(head)

    def _embeddings_follow(self) -> bool:
        """Whether what comes after the layers reads the input embeddings as well."""
        if not any(p.device.type == "meta" for p in self.model.get_input_embeddings().parameters()):
            return False
        found, few = [], (slice(0, 1), slice(0, 8))  # all predictions of a batch would be more than a layer
        for value in (0.0, 1.0):
            with without_embeddings(self.model, value):
                found.append(finish(self.model, self.layers, self.hidden[0][few], self.batches[0][few], self.beside))
        return not torch.equal(*found)

    def head(self, hidden: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        """Logits (n, length, vocabulary) of token ids `batch` whose last decoder layer gave `hidden`; after a walk."""
        with without_embeddings(self.model):
            return finish(self.model, self.layers, hidden, batch, self.beside)

    def predicted(self, batch: torch.Tensor) -> Iterator[slice]:
        """Positions of a batch of token ids (n, length), as many at a time as have PREDICTED logits."""
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        step = max(1, PREDICTED // (len(batch) * vocabulary))
        return (slice(first, first + step) for first in range(0, batch.shape[1], step))

    def head_input(self, hidden: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        """What the output head gets then."""
        with without_embeddings(self.model):
            return head_input(self.model, self.layers, hidden, batch, self.beside)

    @torch.no_grad()
    def logits(self, windows: torch.Tensor, batch_size: int = 8, scratch: Path | None = None) -> Iterator[torch.Tensor]:
        """Logits (batch, length, vocabulary) of each batch, from a walk over all layers."""
        for _ in self.walk(windows, batch_size, scratch):
            pass
        yield from self.predictions()

    def predictions(self) -> Iterator[torch.Tensor]:
        """Logits of each batch of the walk that is over; may be asked for again."""
        with self.output():
            for hidden, batch in zip(self.hidden, self.batches):
                yield self.head(hidden, batch)
