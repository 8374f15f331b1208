"""The frozen part in NF4 (bitsandbytes) while adapters train beside it: QLoRA before any quantization that ships."""

import types

import torch
from torch import nn

from ..model.experts import find_experts
from ..runtime.factorized_experts import FactorizedExperts


def freeze_in_nf4(module: nn.Module, linears: list[str], banks: list[str]) -> None:
    """Holds these linears and float banks of experts (as `adapters.float_targets` names them) in 4 bits.

    They are dequantized when they are used, so that gradients reach what stands before them, whatever the device.
    """
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    for path in linears:
        replace_parameter_4bit(module.get_submodule(path), "weight", quant_type="nf4")
    for path, experts in find_experts(module):
        keys = [bank.removeprefix(path + ".") for bank in banks if bank.startswith(path + ".")]
        if isinstance(experts, FactorizedExperts) and keys:
            _freeze_banks(experts, keys)


@torch.no_grad()
def _freeze_banks(experts: FactorizedExperts, keys: list[str]) -> None:
    """The parameters become zeros without memory, to which peft adds its adapters; the banks are added on use."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    held = {}
    for key in keys:
        parameter = getattr(experts, key)
        held[key] = quantize_4bit(parameter.data, quant_type="nf4")
        zeros = torch.zeros(1, dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)
        parameter.data = zeros

    def weight_rows(self, name, dtype, row=None):
        rows = FactorizedExperts.weight_rows(self, name, dtype, row)
        if name not in held:
            return rows
        with torch.no_grad():
            bank = dequantize_4bit(*held[name])
        return rows + (bank if row is None else bank[row]).to(dtype)

    setattr(experts, "weight_rows", types.MethodType(weight_rows, experts))  # noqa: B010 (of this instance alone)
