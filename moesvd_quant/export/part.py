"""A part of a model that is exported at a time: a decoder layer, or all that is in none."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ..checkpoint.finish import OUTER_FILE, layer_file
from ..model.hf_internals import tied_weights
from ..model.stream import StreamedModel
from ..runtime.factorized_experts import FactorizedExperts
from ..runtime.parts import channel_tensors
from ..runtime.stored import Stored


@dataclass(frozen=True)
class Part:
    """prefix: of the layer's keys, ends with a dot; None for what is in no layer. file: that it is written to."""

    parent: StreamedModel
    prefix: str | None
    file: str

    def holds(self, key: str) -> bool:
        """Whether a key of the model, or a path with a dot after it, is in this part."""
        if self.prefix:
            return key.startswith(self.prefix)
        return not key.startswith(tuple(f"{name}." for name in self.parent.layer_names))

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """(path, module) of its modules."""
        return ((path, m) for path, m in self.parent.model.named_modules() if self.holds(f"{path}."))

    def native_state(self) -> dict[str, torch.Tensor]:
        """Its tensors that are none of ours, by key; they are in memory while the part is."""
        model = self.parent.model
        ours = set(tied_weights(model))
        for path, module in self.modules():
            if isinstance(module, Stored):
                ours |= {f"{path}.{key}" for key in module.stored_tensors()}
            if isinstance(module, FactorizedExperts):
                ours |= {f"{path}.{key}" for key in channel_tensors(module.layout)}
        return {key: tensor for key, tensor in model.state_dict().items() if key not in ours and self.holds(key)}


def parts_of(parent: StreamedModel) -> Iterator[Part]:
    """Every part of a model; each is in memory until the next is asked for."""
    for index, name in enumerate(parent.layer_names):
        parent.load_layer(index)
        yield Part(parent, f"{name}.", layer_file(index))
        parent.drop_layer(index)
    parent.load_outer()
    yield Part(parent, None, OUTER_FILE)
