"""A checkpoint as vLLM gets it: the modules that its layers run are ours, all other weights go by their published
names."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from ...checkpoint.accounting import original_model
from ...errors import ModelError
from ...model.experts import is_shared
from ...model.hf_internals import revert_weight_conversion, tied_weights
from ...model.remaining import counts_left
from ...model.stream import StreamedModel
from ...runtime.factorized_experts import FactorizedExperts
from ...runtime.parts import Layout, layout_from


class ServedCheckpoint:
    """Modules of a checkpoint, by path. They are empty until `weights` has been gone through."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device):
        self.streamed = StreamedModel(folder, dtype, device)
        self.layout: Layout = layout_from(self.streamed.config.moesvd)
        # One number: `config` has refused others.
        self.native = original_model(self.streamed, next(iter(counts_left(self.streamed.model)), None))
        self.taken: dict[str, nn.Module] = {}

    def experts_of(self, layer: int) -> str | None:
        """Path of the routed experts of a decoder layer; None where the layout leaves them as they were."""
        prefix = self.streamed.layer_names[layer] + "."
        found = [path for path in self.layout.experts if path.startswith(prefix) and not self.is_shared(path)]
        return found[0] if found else None

    def is_shared(self, path: str) -> bool:
        return is_shared(self.streamed.model.get_submodule(path))

    def take(self, path: str) -> nn.Module:
        """The module at a path, which from now on a layer of vLLM has."""
        if path not in self.taken:
            self.taken[path] = self.streamed.model.get_submodule(path)
        return self.taken[path]

    def published(self, path: str) -> str:
        """What published files call a module, up to the name of a weight in it."""
        name = next(iter(revert_weight_conversion(self.native, {f"{path}.weight": torch.empty(0, device="meta")})))
        return name.removesuffix(".weight")

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Fills the taken modules, layer by layer; yields all other tensors under their published names. ModelError
        where the layout has a module that no layer has taken."""
        if lost := sorted({*self.layout.experts, *self.layout.linears} - set(self.taken)):
            raise ModelError(f"{self.streamed.folder}: vLLM's model has no layer for {', '.join(lost[:5])}")
        for index, name in enumerate(self.streamed.layer_names):
            self.streamed.load_layer(index)
            yield from self._others(name + ".")
            self.streamed.drop_layer(index)
        self.streamed.load_outer()
        yield from self._others("")

    def _others(self, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        """What stands in memory and was not taken. Taken modules leave the model; vLLM adds the biases of linears
        itself."""
        model, state = self.streamed.model, {}
        for path in [path for path in self.taken if path.startswith(prefix)]:
            module = self.taken[path]
            if not isinstance(module, FactorizedExperts) and module.bias is not None:
                state[f"{path}.bias"], module.bias = module.bias.data, None
            model.set_submodule(path, nn.Module())
        tied = tied_weights(model)
        found = {key: tensor for key, tensor in model.state_dict().items() if key.startswith(prefix)}
        state |= {key: t for key, t in found.items() if key not in tied and t.device.type != "meta"}
        yield from revert_weight_conversion(self.native, state).items()
