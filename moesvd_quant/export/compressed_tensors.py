"""Export in the form of compressed-tensors (`pack-quantized`), which transformers and vLLM read.

It holds codes as we do, eight of b bits in b bytes, the lowest bits first; only the scales are written out.
"""

from typing import Any, ClassVar

import torch

from ..errors import ModelError
from ..quantize.codec import QuantizeError
from ..runtime.grids import Grid
from .packed_form import PackedForm
from .packed_weights import PackedWeight, require_one_form

FORMAT = "pack-quantized"


class CompressedTensorsForm(PackedForm):
    """weight_packed, weight_scale and weight_shape for each matrix. All experts of the model are on grids of one kind,
    and all linears: transformers knows one for experts and one for the rest."""

    fused_names: ClassVar[bool] = False

    def __init__(self, parent, native):
        super().__init__(parent, native)
        require_one_form(self.experts, "transformers reads all experts of this format in one form")
        require_one_form(self.linears, "transformers reads all linears of this format in one form")

    def require(self, weight: PackedWeight) -> None:
        form, columns = weight.form, weight.shape[1]
        if not form.sym:
            raise ModelError(f"{weight}: experts have no zero points in this format; quantize again with gptq.sym=true")
        if columns * form.bits % 32 or columns % form.group_size:
            raise ModelError(f"{weight}: {columns} inputs are no whole groups, or no whole words of 32 bits")

    def encode(self, weight: PackedWeight) -> dict[str, torch.Tensor]:
        tensors, form = weight.matrix().tensors, weight.form
        # vLLM, and transformers for linears, hold scales in the dtype of the model.
        scale = form.scale(tensors).to(self.dtype)
        if not scale.all():
            raise QuantizeError(f"a scale underflows {self.dtype}, which this format stores")
        return {
            "weight_packed": tensors["codes"].contiguous().view(torch.int32),
            "weight_scale": scale,
            "weight_shape": torch.tensor(weight.shape),
        }

    def quantization(self) -> dict[str, Any]:
        # Patterns of experts come first: the class name matches them as well.
        groups = {"experts": ([r"re:.*\.experts\.\d+\..*"], self.experts), "linears": (["Linear"], self.linears)}
        if not self.linears or self.linears[0].form == self.experts[0].form:
            groups = {"experts": (["Linear"], self.experts)}
        return {
            "quant_method": "compressed-tensors",
            "format": FORMAT,
            "quantization_status": "compressed",
            "config_groups": {
                name: {"targets": targets, "format": FORMAT, "weights": _arguments(weights[0].form)}
                for name, (targets, weights) in groups.items()
            },
            "ignore": self.left_as_they_are(),
        }


def _arguments(form: Grid) -> dict[str, Any]:
    return {
        "num_bits": form.bits,
        "group_size": form.group_size,
        "type": "int",
        "strategy": "group",
        "symmetric": True,
        "dynamic": False,
    }
