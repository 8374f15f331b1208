"""Trellis codes on a CPU, without dense matrices where there are few tokens. A copy lies in every checkpoint.

Where numba is missing, `trellis.py` reads codes with torch. What is turned stays turned: inputs are, and outputs are
turned back.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch

from .numba_here import HERE, use_torchs_threads
from .trellis_code import column_bounds, joint_columns, padded, ring_bounds

MANY = 16  # tokens per matrix from which on tiles are read and multiplied by torch
TILE = 2  # rings of a column in such a tile
FIT = 32 - 12  # first bits of windows that a word holds whole


class Groups(NamedTuple):
    """How the weights of a group lie in words of 32 bits, see `trellis_numba`."""

    twice: int
    shape: tuple[int, int]
    starts: np.ndarray
    word_of: np.ndarray
    shifts: np.ndarray


@cache
def groups_of(rate: float) -> Groups:
    """Of a rate: groups are whole bytes, of 8 weights or 16."""
    twice = int(2 * rate)
    each = 8 if twice % 2 == 0 else 16
    first_bits = [i * twice // 2 for i in range(each)]
    starts: list[int] = []
    word_of = []
    for bit in first_bits:
        if not starts or bit - 8 * starts[-1] > FIT:
            starts.append(bit // 8)
        word_of.append(len(starts) - 1)
    shifts = [bit - 8 * starts[word] for bit, word in zip(first_bits, word_of)]
    size = each * twice // 16
    return Groups(twice, (each, size), np.array(starts), np.array(word_of), np.array(shifts, dtype=np.uint32))


def usable(tensor: torch.Tensor) -> bool:
    """Whether the kernels can be had for a tensor."""
    return HERE and tensor.device.type == "cpu"


def read_all(codes: torch.Tensor, rate: float, bounds: np.ndarray) -> torch.Tensor:
    """Values float32 (..., weights), in their order, of codes uint8 (..., columns, bytes) of matrices whose rings have
    these bounds."""
    from .trellis_numba import read

    use_torchs_threads()
    flat = codes.reshape(-1, codes.shape[-2] * codes.shape[-1])
    out = torch.empty(len(flat), bounds[-1])
    for stream, values in zip(flat, out):
        read(stream.numpy(), *groups_of(rate), bounds, values.numpy())
    return out.view(*codes.shape[:-2], bounds[-1])


def mixed_first(x: torch.Tensor, block: int) -> torch.Tensor:
    """x (..., m, n) float32, contiguous, which is changed: times blocks of Hadamard matrices along m."""
    from .trellis_numba import mix_first

    use_torchs_threads()
    for one in x.view(-1, *x.shape[-2:]):
        mix_first(one.numpy(), block)
    return x


def products(codes: torch.Tensor, rate: float, rows: int, x: torch.Tensor, sizes: list[int], dtype) -> torch.Tensor:
    """x (tokens, columns) float32, sorted by matrix, sizes[e] tokens of matrix e; codes uint8 (matrices, columns,
    bytes) -> float32 (tokens, rows): products with the values as they are stored, turned and without scale. dtype: of
    products that torch makes."""
    use_torchs_threads()
    begins = np.concatenate([[0], np.cumsum(sizes)])
    y = torch.empty(len(x), rows)
    limit = MANY if codes.shape[1] % joint_columns(rows) == 0 else 0  # rings of different lengths: one by one
    used = np.array([e for e, size in enumerate(sizes) if 0 < size < limit])
    if len(used):
        _few(codes, groups_of(rate), rows, x, begins, used, y)
    for e, size in enumerate(sizes):
        if size >= max(limit, 1):
            own = slice(begins[e], begins[e + 1])
            y[own] = _by_tiles(codes[e], rate, rows, x[own].to(dtype))
    return y


def _few(codes, groups: Groups, rows: int, x, begins, used, y) -> None:
    """Sets y (tokens, rows) of the tokens of the matrices `used`."""
    from .trellis_numba import few, few_short

    bounds, joint = column_bounds(rows), joint_columns(rows)
    sums = x.sum(1).numpy()
    if joint == 1:
        per = max(1, min(4, len(used) * (len(bounds) - 1) // (2 * torch.get_num_threads())))
        few(codes.numpy(), *groups, bounds, per, x.numpy(), sums, begins, used, y.numpy())
    else:
        by_ring = x.view(len(x), -1, joint).transpose(1, 2).contiguous()
        few_short(codes.numpy(), *groups, padded(rows), joint, by_ring.numpy(), sums, begins, used, y.numpy())


def _by_tiles(codes: torch.Tensor, rate: float, rows: int, x: torch.Tensor) -> torch.Tensor:
    """x (tokens, columns) by torch's product with one tile of rows of a matrix after the other; values are exact in
    bfloat16."""
    from .trellis_numba import tile

    columns = len(codes)
    if joint_columns(rows) > 1:
        values = read_all(codes, rate, ring_bounds(rows, columns)).view(columns, -1)
        return (x @ values.to(x.dtype))[:, :rows]
    groups, bounds, done = groups_of(rate), column_bounds(rows), []
    for low in range(0, len(bounds) - 1, TILE):
        high = min(low + TILE, len(bounds) - 1)
        out = np.empty((columns, bounds[high] - bounds[low]), np.uint16)
        tile(codes.numpy(), *groups, bounds, low, high, out)
        planes = x @ torch.from_numpy(out.view(np.int16)).view(torch.bfloat16).to(x.dtype)
        done.append(planes.unflatten(1, (groups.shape[0], -1)).transpose(1, 2).flatten(1))
    return torch.cat(done, 1)[:, :rows]
