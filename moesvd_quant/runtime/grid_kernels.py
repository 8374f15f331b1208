"""Products with packed grids on a CPU, which never make a dense matrix. A copy lies in every checkpoint.

Compiled by numba at their first use, see `grid_numba.py`; where numba is missing, formats dequantize.
"""

import numpy as np
import torch
import torch.nn.functional as F

from .numba_here import HERE, use_torchs_threads

MANY = 16  # tokens per matrix from which on tiles are dequantized and multiplied by torch
TILE = 512  # rows of such a tile
CHUNK = 32  # rows that a thread takes at a time


def usable(form, stored: dict, x: torch.Tensor) -> bool:
    """Whether these products can be had: on a CPU, without gradients, of integers, groups of whole words."""
    plain = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and not x.requires_grad
    return HERE and plain and not stored["scales"].is_floating_point() and form.group_size % 8 == 0


def products(form, stored: dict, columns: int, x: torch.Tensor, sizes: list[int], table) -> torch.Tensor:
    """x (tokens, columns), sorted by matrix, sizes[e] tokens of matrix e -> (tokens, rows) in the dtype of x."""
    from .grid_numba import few

    use_torchs_threads()
    codes = stored["codes"].numpy()
    levels, base = stored["scales"].numpy(), stored["base"].view(torch.float32)[..., 0].numpy()
    zeros = np.zeros((len(codes), 1), np.uint8) if form.sym else stored["zeros"].numpy()
    matrix = (levels, base, zeros)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    planes, sums = _in_planes(x, form, columns, levels.shape[2])
    y = x.new_empty((len(x), codes.shape[1]))
    used = np.array([e for e, size in enumerate(sizes) if 0 < size < MANY])
    if len(used):
        found = np.empty(y.shape, np.float32)
        asked = planes.float().numpy(), sums.numpy(), starts, used, CHUNK, found
        few(codes, *matrix, form.bits, form.sym, form.group_size, table, *asked)
        y.copy_(torch.from_numpy(found))
    for e, size in enumerate(sizes):
        if size >= MANY:
            rows = slice(starts[e], starts[e + 1])
            own = codes[e], levels[e], base[e], zeros[e]
            y[rows] = _by_tiles(own, form, table, planes[rows].flatten(1))
    return y


def _by_tiles(own: tuple, form, table, x: torch.Tensor) -> torch.Tensor:
    """x (tokens, 8 * words) in planes, by torch's product with one tile of rows after the other."""
    from .grid_numba import tile

    count, done = len(own[0]), []
    for first in range(0, count, TILE):
        out = np.empty((min(TILE, count - first), x.shape[1]), np.float32)
        tile(*own, form.bits, form.sym, form.group_size, table, first, out)
        done.append(F.linear(x, torch.from_numpy(out).to(x.dtype)))
    return torch.cat(done, 1)


def _in_planes(x: torch.Tensor, form, columns: int, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, 8, words) of the inputs, and (tokens, groups) float32 sums of each group's."""
    words = -(-columns // 8)
    padded = F.pad(x, (0, 8 * words - columns))
    whole = F.pad(x.float(), (0, groups * form.group_size - columns))
    sums = whole.view(len(x), groups, form.group_size).sum(-1)
    if form.bits == 8:
        return padded.reshape(len(x), 8, words).contiguous(), sums
    return padded.view(len(x), words, 8).transpose(1, 2).contiguous(), sums
