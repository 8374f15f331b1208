"""What the exports that keep packed weights have in common."""

from typing import Any, ClassVar

import torch
from torch import nn

from ..errors import ModelError
from ..model.hf_internals import revert_weight_conversion
from ..model.stream import StreamedModel
from ..quantize.codec import QuantizeError
from .file_names import expert_names, linear_names
from .packed_weights import ADVICE, PackedWeight, packed_weights
from .part import Part


class PackedForm:
    """The packed weights of ours in another layout, under the names that the architecture's files have; all else as the
    architecture's own class, `native`, has it. ModelError, before any work, where that cannot be.
    """

    fused_names: ClassVar[bool]  # whether there are names for the experts of files that hold those of a layer together

    def __init__(self, parent: StreamedModel, native: nn.Module):
        self.native, self.dtype = native, parent.stored_dtype
        self.weights = packed_weights(parent.model)
        self.experts = [weight for weight in self.weights if weight.expert is not None]
        self.linears = [weight for weight in self.weights if weight.expert is None]
        self.names = linear_names(native, (weight.home for weight in self.linears))
        if lost := [weight for weight in self.linears if weight.home not in self.names]:
            raise ModelError(f"{lost[0]}: files of {native.config.model_type} hold no such matrix; {ADVICE}")
        self.expert_names = expert_names(native, dict.fromkeys(weight.home for weight in self.experts))
        if self.experts and not self.expert_names and not self.fused_names:
            raise ModelError(
                f"{self.experts[0].home}: files of {native.config.model_type} hold the experts of a layer in one "
                f"tensor, and this form has one for each; {ADVICE}"
            )
        for weight in self.weights:
            self.require(weight)

    def require(self, weight: PackedWeight) -> None:
        """ModelError where the form cannot hold a weight, as far as its shape and grid show."""
        raise NotImplementedError

    def encode(self, weight: PackedWeight) -> dict[str, torch.Tensor]:
        """Tensors of a weight, by what they are called after its name. QuantizeError where its values do not fit."""
        raise NotImplementedError

    def quantization(self) -> dict[str, Any] | None:
        """What config.json says of it under `quantization_config`."""
        raise NotImplementedError

    def name(self, weight: PackedWeight) -> str:
        """A weight's name in the files, without what follows it."""
        if weight.expert is None or weight.projection is None:
            return self.names[weight.home]
        own = weight.home, weight.expert, weight.projection
        return self.expert_names.get(own, f"{weight.home}.{weight.expert}.{weight.projection}_proj")

    def tensors(self, part: Part) -> dict[str, torch.Tensor]:
        """Tensors of a part, which has to be in memory, by their names in the files."""
        found = self.other_tensors(part.native_state())
        for weight in self.weights:
            if not part.holds(f"{weight.home}."):
                continue
            try:
                made = self.encode(weight)
            except QuantizeError as error:
                raise ModelError(f"{weight}: {error}") from error
            found |= {f"{self.name(weight)}.{kind}": tensor for kind, tensor in made.items()}
        return found

    def other_tensors(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What is not packed, by its names in the files, from what it is called in memory."""
        return revert_weight_conversion(self.native, state)

    def left_as_they_are(self) -> list[str]:
        """Paths of the modules with a matrix that is not packed, but embeddings, as they are in memory and in files."""
        packed = {weight.home for weight in self.linears}
        paths = [
            path
            for path, module in self.native.named_modules()
            if getattr(module._parameters.get("weight"), "ndim", 0) == 2
            and not isinstance(module, nn.Embedding)
            and path not in packed
        ]
        return sorted({*paths, *linear_names(self.native, paths).values()})
