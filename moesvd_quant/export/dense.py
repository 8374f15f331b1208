"""Export as plain 16-bit weights: the checkpoint that the architecture itself has."""

from typing import Any

import torch
from torch import nn

from ..checkpoint.accounting import stored_tensors
from ..model.experts import split_projections
from ..model.folder import ModelError
from ..model.hf_internals import revert_weight_conversion
from ..model.stream import StreamedModel
from ..runtime.factorized_experts import FactorizedExperts
from ..runtime.native_experts import form_of
from ..runtime.stored import StoredLinear
from .part import Part


class DenseForm:
    """The weights of `native`, the architecture's own class on the meta device, made from those of ours.

    ModelError where no dense weight does the same.
    """

    def __init__(self, parent: StreamedModel, native: nn.Module):
        self.native, self.dtype = native, parent.stored_dtype
        for path, module in parent.model.named_modules():
            if "channel_prior" in module._parameters:
                raise ModelError(
                    f"{path}: each token chooses channels of the base (d2.dynamic): no dense weight does the same"
                )

    def tensors(self, part: Part) -> dict[str, torch.Tensor]:
        """Tensors of a part, under the names and in the form that the architecture's files have."""
        state = part.native_state()
        for path, module in part.modules():
            if isinstance(module, StoredLinear):
                state[f"{path}.weight"] = module.dense_weight().to(self.dtype)
            if isinstance(module, FactorizedExperts):
                fused = _fused(module, self.native.get_submodule(path), self.dtype)
                state |= {f"{path}.{name}": tensor for name, tensor in fused.items()}
        wanted = {key for key in stored_tensors(self.native) if part.holds(key)}
        if lost := sorted(wanted ^ set(state)):
            raise ModelError(f"{part.parent.folder}: tensors do not fit the native model: {lost[:5]}")
        return revert_weight_conversion(self.native, state)

    def quantization(self) -> dict[str, Any] | None:
        """What config.json says of it under `quantization_config`."""
        return None


def _fused(module: FactorizedExperts, native, dtype) -> dict[str, torch.Tensor]:
    """The weight parameters of the native experts module, by their names, as its class lays them out."""
    names = form_of(native).parameters(native)
    for name in names:
        _put(native, name, torch.zeros(native.get_parameter(name).shape, dtype=dtype))
    views = split_projections(native)
    with torch.no_grad():
        for name, view in views.items():
            for expert in range(module.experts):
                view[expert].copy_(module.dense(name, expert))
    made = {name: native.get_parameter(name).data for name in names}
    for name, tensor in made.items():
        _put(native, name, tensor.to("meta"))
    return made


def _put(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module.get_submodule(path)._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
