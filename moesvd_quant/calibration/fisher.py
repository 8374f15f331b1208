"""Empirical Fisher information of expert weights, by a backward pass that holds one decoder layer at a time."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from ..decompose.deltas import merge_base
from ..model.experts import find_experts, split_projections, weight_parameters
from ..model.folder import ModelError
from ..model.stream import StreamedModel


def expert_fisher(
    streamed: StreamedModel,
    windows: torch.Tensor,
    progress: Callable[[int, int], None] = lambda done, total: None,
    scratch: Path | None = None,
) -> Iterator[tuple[int, dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]]]]:
    """(layer index, {path: {projection: (weights, fisher)}}) from the last layer to the first, both (E, out, in) and
    gone when the next is asked for.

    fisher is the mean over sequences of the squared gradient of the sequence's mean loss on the next token, in float32.
    windows (n, length) int64. Hidden states of all layers are kept for the way back, in the folder `scratch` if given.
    """
    inputs, calls = [], []
    for visit in streamed.walk(windows, batch_size=1, scratch=scratch):
        if streamed.stateful:
            raise ModelError(
                f"{streamed.folder}: layers of this model hand each other more than hidden states, through which no "
                "gradient is followed; use d2.merge: frequency or mean, or another svd.method than fwsvd"
            )
        inputs.append(visit.hidden)
        calls.append(visit.calls)
    gradients = streamed.hidden.like()
    with streamed.output():
        for hidden, ids in zip(streamed.hidden, windows):
            gradients.append(_loss_gradient(streamed, hidden, ids.to(streamed.device)))
    count = len(streamed.layer_names)
    for index in reversed(range(count)):
        layer = streamed.load_layer(index)
        experts = dict(find_experts(layer))
        weights = [p for module in experts.values() for p in weight_parameters(module)]
        sums = [torch.zeros_like(p, dtype=torch.float32) for p in weights]
        hooks = [p.requires_grad_(True).register_post_accumulate_grad_hook(_adder(s)) for p, s in zip(weights, sums)]
        before = gradients.like()
        for states, gradient, (args, kwargs) in zip(inputs[index], gradients, calls[index]):
            states = states.detach().requires_grad_(True)
            with torch.enable_grad():
                out = layer(states, *args, **kwargs)
                (out[0] if isinstance(out, tuple) else out).backward(gradient)
            before.append(states.grad)
        gradients = before
        for hook, p, total in zip(hooks, weights, sums):
            hook.remove()
            p.requires_grad_(False)
            total /= len(windows)
        yield index, _by_projection(experts, sums)
        inputs[index] = calls[index] = []
        streamed.drop_layer(index)
        progress(count - index, count)


def fisher_bases(streamed: StreamedModel, windows: torch.Tensor, progress, scratch: Path | None) -> Iterator:
    """(full path of an experts module, {projection: base (out, in) float32}) of all, merged by Fisher information;
    arguments as `expert_fisher`."""
    for index, modules in expert_fisher(streamed, windows, progress, scratch):
        for path, projections in modules.items():
            bases = {name: merge_base(*pair).float() for name, pair in projections.items()}
            yield f"{streamed.layer_names[index]}.{path}", bases


def fisher_inputs(streamed: StreamedModel, windows: torch.Tensor, progress, scratch: Path | None) -> Iterator:
    """(full path of an experts module, {projection: (E, in) float32}) of all: the Fisher information of the weights of
    each input together; arguments as `expert_fisher`."""
    for index, modules in expert_fisher(streamed, windows, progress, scratch):
        for path, projections in modules.items():
            yield f"{streamed.layer_names[index]}.{path}", {name: f.sum(1) for name, (_, f) in projections.items()}


def _adder(total: torch.Tensor) -> Callable[[torch.Tensor], None]:
    """Adds the square of a gradient as soon as it is there, and gives its memory back."""

    def add(parameter: torch.Tensor) -> None:
        total.addcmul_(parameter.grad.float(), parameter.grad.float())
        parameter.grad = None

    return add


def _loss_gradient(streamed: StreamedModel, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Gradient of the mean loss of a sequence (length,) with respect to the last hidden states (1, length, hidden)."""
    hidden = hidden.detach().requires_grad_(True)
    with torch.enable_grad():
        F.cross_entropy(streamed.head(hidden, ids[None])[0, :-1].float(), ids[1:]).backward()
    return hidden.grad


def _by_projection(experts: dict, sums: list[torch.Tensor]) -> dict:
    """Weights and sums by projection; a module's sums are split as its weights are."""
    found, rest = {}, iter(sums)
    for path, module in experts.items():
        weights = {name: w.detach() for name, w in split_projections(module).items()}
        parameters = weight_parameters(module)
        held = [p.data for p in parameters]
        for p in parameters:
            p.data = next(rest)
        found[path] = {name: (weights[name], s.detach()) for name, s in split_projections(module).items()}
        for p, data in zip(parameters, held):
            p.data = data
    return found
