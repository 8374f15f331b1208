"""What a model does around its decoder layers, learnt from runs in which the layers do no work.

How layers are called (masks, positions, which extras) is the architecture's own business: its code is run with layers
that hand their input on, and what each was called with is written down.
"""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..memory.limits import Batches
from .visit import whole

DISTINCT = 8  # tensors of one shape that a new one is compared with


class StatePassedOn(Exception):
    """A layer returns more than hidden states, and the next one is given it."""


class StopForward(Exception):
    """The run got where it had to get."""


class UnpackGuard(torch.Tensor):
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
    except StopForward:
        return None


class TensorInterner:
    """Keeps one of equal tensors: masks and positions are the same for all batches of a shape."""

    def __init__(self) -> None:
        self.seen: dict[tuple, list[torch.Tensor]] = {}

    def __call__(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self(item) for key, item in value.items()}
        if type(value) in (tuple, list):
            return type(value)(map(self, value))
        if not isinstance(value, torch.Tensor):
            return value
        seen = self.seen.setdefault((value.shape, value.dtype), [])
        same = next((other for other in seen if other is value or torch.equal(other, value)), None)
        if same is None and len(seen) < DISTINCT:
            seen.append(value)
        return value if same is None else same


def record(model: nn.Module, layers: nn.ModuleList, batches, hidden: Batches) -> tuple[Batches, list[list[tuple]]]:
    """The inputs of the first layer, kept as `hidden` (which is empty) is, and calls[layer][batch]: (args, kwargs)
    beside the hidden states. Raises StatePassedOn where a layer is given more than hidden states from the one before.
    """
    for wrap in (False, True):
        inputs, once = hidden.like(), TensorInterner()
        calls: list[list] = [[] for _ in layers]

        def instead(index, args, kwargs, calls=calls, wrap=wrap, inputs=inputs, once=once):
            states = args[0].as_subclass(torch.Tensor)
            if index == 0:
                inputs.append(states)
            calls[index].append((once(args[1:]), once(kwargs)))
            if index == len(calls) - 1:
                raise StopForward
            whole = states.as_subclass(UnpackGuard)
            return (whole,) if wrap else whole

        try:
            with Patched(layers, instead):
                for batch in batches:
                    run(model, batch)
            return inputs, calls
        except (StatePassedOn, ValueError, IndexError, TypeError) as error:
            if wrap:
                raise StatePassedOn(str(error)) from error
    raise AssertionError


@contextmanager
def without_embeddings(model: nn.Module, value: float = 0.0):
    """Replaces input embeddings that are on the meta device by one number, so that the model runs without them.

    For passes that only record which layers are called: their values rarely depend on the embeddings."""
    held = [
        (module, name, weight)
        for module in model.get_input_embeddings().modules()  # some have a norm of their own
        for name, weight in module._parameters.items()
        if weight is not None and weight.device.type == "meta"
    ]
    device = next(p.device for p in model.parameters() if p.device.type != "meta") if held else None
    for module, name, weight in held:
        same = torch.full((), value, dtype=weight.dtype, device=device).expand(weight.shape)
        module._parameters[name] = nn.Parameter(same, requires_grad=False)
    try:
        yield
    finally:
        for module, name, weight in held:
            module._parameters[name] = weight


def finish(
    model: nn.Module, layers: nn.ModuleList, hidden: torch.Tensor, batch: torch.Tensor, beside: tuple | None
) -> torch.Tensor:
    """Logits (n, length, vocabulary) of the model whose last layer gave `hidden`, and `beside` it."""
    out = whole(hidden, beside)
    with Patched(layers, lambda index, args, kwargs: out):
        return run(model, batch).logits


def head_input(
    model: nn.Module, layers: nn.ModuleList, hidden: torch.Tensor, batch: torch.Tensor, beside: tuple | None
) -> torch.Tensor:
    """What the output head of the model gets where its last layer gave `hidden`, and `beside` it."""
    seen: list[torch.Tensor] = []

    def stop(module, args):
        seen.append(args[0])
        raise StopForward

    hook = model.get_output_embeddings().register_forward_pre_hook(stop)
    out = whole(hidden, beside)
    try:
        with Patched(layers, lambda index, args, kwargs: out):
            run(model, batch)
    finally:
        hook.remove()
    return seen[0]
