"""Axes that are turned: by signs, then by Hadamard matrices in blocks. A copy lies in every checkpoint."""

from functools import lru_cache

import numpy as np
import torch

from .numba_here import usable

BLOCK = 256  # size of a Hadamard matrix, at most: sums of 60 * BLOCK * BLOCK are exact in float32
ALONE = 2**15  # numbers that one thread turns sooner than two


def block_of(size: int) -> int:
    """Size of the Hadamard matrices of an axis: the largest power of two that divides it, at most BLOCK."""
    return min(size & -size, BLOCK)


@lru_cache(maxsize=64)
def signs(size: int, device: torch.device) -> torch.Tensor:
    """(size,) float32 of 1 and -1, the same for every matrix: the bits of a mixed counter."""
    mixed = np.arange(1, size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bit = (mixed >> np.uint64(40)) & np.uint64(1)
    return torch.from_numpy(bit.astype(np.float32) * 2 - 1).to(device)


@lru_cache(maxsize=64)
def hadamard(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(size, size) of 1 and -1, symmetric; size a power of two."""
    made = torch.ones(1, 1)
    while len(made) < size:
        made = torch.cat([torch.cat([made, made], 1), torch.cat([made, -made], 1)])
    return made.to(device, dtype)


def mix(x: torch.Tensor) -> torch.Tensor:
    """x (..., n) times the blocks of Hadamard matrices, not normalized: twice gives `block_of(n)` times x."""
    block = block_of(x.shape[-1])
    return (x.unflatten(-1, (-1, block)) @ hadamard(block, x.dtype, x.device)).flatten(-2)


def turn(x: torch.Tensor) -> torch.Tensor:
    """x (..., n) -> (..., n), an orthogonal map: signs, then blocks. Of inputs before, of rows after."""
    size = x.shape[-1]
    return mix(x * signs(size, x.device).to(x.dtype)) / block_of(size) ** 0.5


def turn_back(x: torch.Tensor) -> torch.Tensor:
    """The inverse of `turn`."""
    size = x.shape[-1]
    return mix(x) * (signs(size, x.device).to(x.dtype) / block_of(size) ** 0.5)


def mixed_before(x: torch.Tensor) -> torch.Tensor:
    """x (..., size, n) float32 of whole numbers -> `mix` of the axis before the last, contiguous."""
    if not usable(x):
        return mix(x.transpose(-1, -2)).transpose(-1, -2).contiguous()
    from .hadamard_numba import mix_first
    from .team import run

    x = x.contiguous()
    for one in x.view(-1, *x.shape[-2:]):
        run(mix_first, [one, *one.shape, block_of(x.shape[-2])])
    return x


def turn_rows(x: torch.Tensor) -> None:
    """`turn` of x (tokens, n) float32, in place and not normalized, where kernels are `usable`."""
    _mix_rows(x, True, np.ones(len(x), np.float32))


def turn_rows_back(x: torch.Tensor, scale: np.ndarray) -> None:
    """`turn_back` of x (tokens, n) float32, in place and not normalized, times scale (tokens,), where kernels are
    `usable`."""
    _mix_rows(x, False, scale)


def _mix_rows(x: torch.Tensor, signs_first: bool, scale: np.ndarray) -> None:
    from .hadamard_numba import mix_last
    from .team import run

    size = x.shape[1]
    run(mix_last(block_of(size), signs_first), [x, signs(size, x.device), scale, *x.shape], alone=x.numel() < ALONE)
