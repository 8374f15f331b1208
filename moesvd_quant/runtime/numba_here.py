"""What of this machine kernels build on. A copy lies in every checkpoint."""

from functools import cache
from importlib.util import find_spec

import torch

HERE = find_spec("numba") is not None
LANES = 16  # of the vectors that kernels for CPUs are written in
TRITON = find_spec("triton") is not None
FEW = 64  # tokens per matrix up to which kernels for GPUs read codes anew for each tile of tokens


def usable(tensor: torch.Tensor) -> bool:
    """Whether kernels for CPUs can be had for a tensor."""
    return HERE and tensor.device.type == "cpu"


def on_gpu(x: torch.Tensor, codes: torch.Tensor, sizes: list[int] | None = None) -> bool:
    """Whether kernels for GPUs serve these tokens, where it is known how many each matrix has."""
    plain = x.is_cuda and not x.requires_grad and codes.dtype == torch.uint8
    return TRITON and plain and max(sizes or [0]) <= FEW


@cache
def dtype_of_products(dtype: torch.dtype) -> torch.dtype:
    """That in which torch multiplies many tokens of a dtype fastest: float32 where a CPU has no units for 16 bits,
    which torch then does many times slower."""
    return dtype if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
