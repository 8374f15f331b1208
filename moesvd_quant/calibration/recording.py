"""A layer's statistics into a file, in as much memory as there is."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..memory.files import TensorFile
from ..memory.limits import Memory
from ..model.experts import expert_count, find_experts, find_linears, shapes_of
from ..model.stream import StreamedModel
from .statistics import LayerRecorder

BATCH_TOKENS = 2048  # part of the result: sums run batch by batch, of at most so many tokens or one window


def windows_at_once(length: int) -> int:
    """Windows of `length` tokens in a batch of the walk."""
    return max(1, BATCH_TOKENS // length)


def record_layer(layer: nn.Module, path: Path, run: Callable[[], Any], at_once: int | None, scratch: Path) -> None:
    """The sums of `LayerRecorder` while `run` takes all batches through the layer, into the file `path`.

    at_once: experts of a module whose Gram matrices are in memory at a time, None for all; the inputs of the others
    wait in the folder `scratch`.
    """
    recorder = LayerRecorder(layer, at_once, scratch)
    run()
    recorder.detach()
    tensors = recorder.sums | {f"{name}/alias": _text(other) for name, other in recorder.aliases.items()}
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    for where, experts in recorder.experts.items():
        shapes |= {f"{where}/{n}": ((experts.count, *shape), kind) for n, (shape, kind) in experts.shapes().items()}
    with TensorFile(path, shapes) as file:
        for name, tensor in tensors.items():
            file.put(name, tensor)
        for where, experts in recorder.experts.items():
            for group, sums in experts.groups():
                for expert in group:
                    for name, values in sums.items():
                        file.put(f"{where}/{name}", values[expert - group.start], expert)


def pass_on(layer: nn.Module, run: Callable[[], Any]) -> None:
    """Runs a layer that is recorded already, with the same arithmetic, so that later layers get identical inputs."""
    recorder = LayerRecorder(layer, 0)
    run()
    recorder.detach()


def experts_at_once(layer: nn.Module, memory: Memory, activations: int) -> int | None:
    """Experts whose Gram matrices fit beside those of the other linears and what a batch needs; None for all."""
    modules = [experts for _, experts in find_experts(layer)]
    if not modules:
        return None
    each = sum(4 * (hidden**2 + inner**2) for hidden, inner in (shapes_of(m)["down"] for m in modules))
    count = max(map(expert_count, modules))
    fit = memory.at_once(count, each, activations + linear_sums(layer))
    return None if fit == count else fit


def recorded_bytes(layers: Iterable[nn.Module]) -> int:
    """Bytes of the statistics of layers on disk; at most: Gram matrices that linears share are counted apart."""
    total = 0
    for layer in layers:
        for _, experts in find_experts(layer):
            hidden, inner = shapes_of(experts)["down"]
            total += 4 * expert_count(experts) * (hidden**2 + inner**2 + hidden + inner)
        total += sum(4 * linear.in_features**2 for _, linear in find_linears(layer))
    return total


def linear_sums(layer: nn.Module) -> int:
    """Bytes of the Gram matrices of a layer's other linears (an upper bound: some share one), and of a batch's part."""
    sizes = [4 * linear.in_features**2 for _, linear in find_linears(layer)]
    return sum(sizes) + max(sizes, default=0)


def head_gram(streamed: StreamedModel) -> torch.Tensor:
    """The Gram matrix (hidden, hidden) of the inputs of the output head, float32; after a walk."""
    total: torch.Tensor | None = None
    for hidden, batch in zip(streamed.hidden, streamed.batches):
        flat = streamed.head_input(hidden, batch).flatten(0, -2).float()
        total = flat.new_zeros(flat.shape[1], flat.shape[1]) if total is None else total
        total.addmm_(flat.T, flat)
    assert total is not None
    return total.cpu()


def is_known(statistics: dict, path: str) -> bool:
    """Whether the walk reached a linear."""
    return f"{path}/gram" in statistics or f"{path}/alias" in statistics


def linear_gram(statistics: dict, path: str) -> torch.Tensor:
    """Gram matrix (in, in) of a linear; KeyError where the walk never reached it."""
    alias = statistics.get(f"{path}/alias")
    return statistics[f"{bytes(alias.tolist()).decode() if alias is not None else path}/gram"]


def _text(value: str) -> torch.Tensor:
    return torch.tensor(list(value.encode()), dtype=torch.uint8)
