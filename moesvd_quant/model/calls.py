"""What a model does around its decoder layers, learnt from runs in which the layers do no work.

How layers are called (masks, positions, which extras) is the architecture's own business: its code is run with layers
that hand their input on, and what each was called with is written down.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class StatePassedOn(Exception):
    """A layer returns more than hidden states, and the next one is given it."""


class Reached(Exception):
    """The run got where it had to get."""


class _Whole(torch.Tensor):
    """Hidden states that a model may compute with, but not take apart as if they were a tuple."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __iter__(self):
        raise StatePassedOn

    def __getitem__(self, key):
        if isinstance(key, int):
            raise StatePassedOn
        return torch.Tensor(self)[key]


class Patched:
    """Within it, the layers of a decoder call `instead(index, args, kwargs)`, hidden states as first argument."""

    def __init__(self, layers: nn.ModuleList, instead: Callable[[int, tuple, dict], Any]):
        self.layers, self.instead = layers, instead

    def __enter__(self):
        for index, layer in enumerate(self.layers):

            def forward(*args, _index=index, **kwargs):
                return self.instead(_index, (args or (kwargs.pop("hidden_states"),)), kwargs)

            layer.forward = forward

    def __exit__(self, *_):
        for layer in self.layers:
            del layer.forward


def run(model: nn.Module, batch: torch.Tensor):
    """A forward of the model on token ids (n, length), to its end or to where a patched layer stops it."""
    try:
        return model(input_ids=batch, use_cache=False)
    except Reached:
        return None


def record(model: nn.Module, layers: nn.ModuleList, batches) -> list[list[tuple]]:
    """calls[layer][batch]: (args, kwargs), hidden states first. Raises StatePassedOn where a layer is given more
    than hidden states from the one before.
    """
    for wrap in (False, True):
        calls: list[list] = [[] for _ in layers]

        def instead(index, args, kwargs, calls=calls, wrap=wrap):
            hidden = args[0].as_subclass(torch.Tensor)
            calls[index].append(((hidden, *args[1:]), kwargs))
            if index == len(calls) - 1:
                raise Reached
            whole = hidden.as_subclass(_Whole)
            return (whole,) if wrap else whole

        try:
            with Patched(layers, instead):
                for batch in batches:
                    run(model, batch)
            return calls
        except (StatePassedOn, ValueError, IndexError, TypeError) as error:
            if wrap:
                raise StatePassedOn(str(error)) from error
    raise AssertionError


def finish(
    model: nn.Module, layers: nn.ModuleList, hidden: torch.Tensor, batch: torch.Tensor, like: Any
) -> torch.Tensor:
    """Logits (n, length, vocabulary) of the model whose last layer gave `hidden`; `like`: what a layer returned."""
    out = (hidden, *like[1:]) if isinstance(like, tuple) else hidden
    with Patched(layers, lambda index, args, kwargs: out):
        return run(model, batch).logits


def head_input(
    model: nn.Module, layers: nn.ModuleList, hidden: torch.Tensor, batch: torch.Tensor, like: Any
) -> torch.Tensor:
    """What the output head of the model gets where its last layer gave `hidden`."""
    seen: list[torch.Tensor] = []

    def stop(module, args):
        seen.append(args[0])
        raise Reached

    hook = model.get_output_embeddings().register_forward_pre_hook(stop)
    out = (hidden, *like[1:]) if isinstance(like, tuple) else hidden
    try:
        with Patched(layers, lambda index, args, kwargs: out):
            run(model, batch)
    finally:
        hook.remove()
    return seen[0]
