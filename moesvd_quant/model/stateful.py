"""The layer walk for models whose layers hand each other more than hidden states (router states, chosen indices, keys).

Each batch's forward runs in a thread of its own, which stops at every layer until all batches have passed it: the
model's own code carries the state, and still one layer at a time is in memory. One thread runs at a time.
"""

import threading
from collections.abc import Iterator
from typing import Any

import torch

from .calls import Patched, Reached, run


class Forward:
    """A forward of one batch that waits at each layer. `call`: (args, kwargs) of the layer it stands at."""

    def __init__(self, model, batch: torch.Tensor):
        self.call: tuple | None = None
        self._answer: Any = None
        self._error: BaseException | None = None
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, args=(model, batch), daemon=True)
        _WAITING[self._thread] = self

    def start(self) -> None:
        self._thread.start()
        self._stopped.acquire()
        self._check()

    def answer(self, output: Any) -> None:
        """Goes on to the next layer with what this one gave; after the last one to the end."""
        self.call, self._answer = None, output
        self._go.release()
        self._stopped.acquire()
        self._check()

    def at_layer(self, args: tuple, kwargs: dict) -> Any:
        """Called in the forward's own thread by a patched layer."""
        self.call = args, kwargs
        self._stopped.release()
        self._go.acquire()
        return self._answer

    def _run(self, model, batch):
        try:
            with torch.no_grad():
                run(model, batch)
        except BaseException as error:
            self._error = error
        finally:
            _WAITING.pop(self._thread, None)
            self._stopped.release()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error


_WAITING: dict[threading.Thread, Forward] = {}


def forwards(model, layers, batches) -> Iterator[tuple[int, list[Forward]]]:
    """(layer index, the forwards standing at it). The user answers each before taking the next; layers that the user
    calls in between do their work."""
    made: list[Forward] = []

    def instead(index, args, kwargs):
        me = _WAITING.get(threading.current_thread())
        if me is None:
            return type(layers[index]).forward(layers[index], *args, **kwargs)
        out = me.at_layer(args, kwargs)
        if index == len(layers) - 1 or out is None:
            raise Reached
        return out

    try:
        with Patched(layers, instead):
            for batch in batches:
                made.append(Forward(model, batch))
                made[-1].start()
            for index in range(len(layers)):
                yield index, made
    finally:
        for forward in made:
            if forward.call is not None:  # the walk was left early
                forward.answer(None)
