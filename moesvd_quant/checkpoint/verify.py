"""That a checkpoint holds what its stage made: every target was changed, and computes the same after reload."""

import hashlib
from collections.abc import Container, Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from ..model.folder import ModelError
from ..model.headers import same_bits, same_on_disk
from ..model.opened import Opened, open_folder
from ..model.stream import StreamedModel
from ..runtime.factorized_experts import FactorizedExperts
from ..runtime.parts import Layout
from ..runtime.stored import StoredLinear

PROBES = 8  # random inputs of a linear; experts get one each


class VerifyError(ModelError):
    """A checkpoint that is not what its plan says: a defect, never the user's."""


def targets(layout: Layout, prefix: str) -> list[str]:
    """Paths of the layout under a prefix, which ends with a dot or is a whole path."""
    return [path for path in (*layout.experts, *layout.linears) if path.startswith(prefix)]


def outputs(model: nn.Module, paths: Iterable[str]) -> dict[str, str]:
    """sha256 of what each target gives for fixed random inputs; VerifyError where one was not changed."""
    found = {}
    for path in paths:
        module = model.get_submodule(path)
        if not isinstance(module, FactorizedExperts | StoredLinear):
            raise VerifyError(f"{path}: is in the plan and was not changed; this is a defect")
        found[path] = _digest(module)
    return found


@torch.no_grad()
def _digest(module: FactorizedExperts | StoredLinear) -> str:
    for parameter in module.parameters():
        # A tensor mapped from a file may start at any address, and products differ in the last bit with it.
        parameter.data = parameter.data.clone()
    generator = torch.Generator().manual_seed(0)
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    like = dict(device=module.device, dtype=dtype)
    if isinstance(module, StoredLinear):
        y = module(torch.randn(PROBES, module.in_features, generator=generator).to(**like))
    else:
        x = torch.randn(module.experts, module.shapes["down"][0], generator=generator).to(**like)
        each = torch.arange(module.experts, device=module.device)  # every expert once
        y = module.compute(x, each, each)
    return hashlib.sha256(y.float().cpu().numpy().tobytes()).hexdigest()


def check_reload(streamed: StreamedModel, layout: Layout, expected: dict[str, str]) -> None:
    """VerifyError where a target of the checkpoint on disk computes something else than `expected`."""
    streamed.load_outer()
    for index, name in enumerate([*streamed.layer_names, "lm_head"]):
        inside = index < len(streamed.layer_names)
        if inside:
            streamed.load_layer(index)
        found = outputs(streamed.model, targets(layout, name + "." if inside else name))
        if inside:
            streamed.drop_layer(index)
        if wrong := [path for path in found if found[path] != expected.get(path)]:
            raise VerifyError(f"{streamed.folder}: reloads to other values at {', '.join(wrong)}; this is a defect")


def check_carried(parent: StreamedModel, folder: Path, layout: Layout, changes: Container[str] = ()) -> None:
    """VerifyError where a tensor that a stage leaves alone is not in the checkpoint as its input has it: the same dtype
    and bits. What is outside the modules of the layout, not named in `changes`, and no row of a router whose experts
    changed."""
    before, after = parent.opened, open_folder(folder)
    assert before is not None
    changed = tuple(f"{path}." for path in (*layout.experts, *layout.linears))
    regrouped = tuple(path.rpartition(".")[0] + "." for path in layout.sources)
    for name, (stored,) in after.census.sources.items():
        if name in changes or name.startswith(changed):
            continue
        if name.startswith(regrouped) and not _same_shape(parent, name, after, stored):
            continue
        sources = before.census.sources.get(name, [])
        if len(sources) == 1 and name not in before.census.converted and before.quantizer is None:
            same = same_on_disk(before.folder, before.tensors, sources[0], folder, after.tensors, stored)
        else:
            same = _same_when_read(parent, name, folder / after.tensors[stored].file, stored)
        if not same:
            raise VerifyError(f"{folder}: {name} is not what {parent.folder} has, and no stage changes it; a defect")
    for name in parent.unused():
        if not same_on_disk(before.folder, before.tensors, name, folder, after.tensors, name):
            raise VerifyError(f"{folder}: {name} is not what {parent.folder} has; this is a defect")


def _same_shape(parent: StreamedModel, name: str, after: Opened, stored: str) -> bool:
    tensor = parent.model.state_dict().get(name)
    return tensor is not None and tuple(tensor.shape) == after.tensors[stored].shape


def _same_when_read(parent: StreamedModel, name: str, file: Path, stored: str) -> bool:
    """The same of a tensor that is made of several on disk, or dequantized."""
    parent.load(name)
    with safe_open(file, "pt") as opened:
        same = same_bits(parent.model.state_dict()[name].cpu(), opened.get_tensor(stored))
    parent.drop(name.rpartition(".")[0])
    return same
