"""Products with packed grids on a CPU, which never make a dense matrix. A copy lies in every checkpoint.

Compiled by numba at their first use, see `grid_numba.py`; where numba is missing, formats dequantize.
"""

import torch
import torch.nn.functional as F

from .numba_here import HERE, LANES, dtype_of_products, on_gpu
from .spans import Span, few_and_many, spans_of

TILE = 2**22  # bytes of rows that are dequantized at a time, where a matrix has many tokens
BLOCK = 8 * LANES  # codes, which lie in LANES words
PLANES = 9  # of an input's block, see `grid_lanes`: the last has each lane's sum


def usable(form, stored: dict, x: torch.Tensor) -> bool:
    """Whether these products can be had: without gradients, of integers; on a CPU of groups that fit blocks of 128."""
    if on_gpu(x, stored["codes"]):
        return not stored["scales"].is_floating_point()
    plain = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and not x.requires_grad
    fits = form.group_size % 8 == 0 and (BLOCK % form.group_size == 0 or form.group_size % BLOCK == 0)
    return HERE and plain and fits and not stored["scales"].is_floating_point()


def products(form, stored: dict, columns: int, x: torch.Tensor, sizes: list[int], table) -> torch.Tensor:
    """x (tokens, columns), sorted by matrix, sizes[e] tokens of matrix e -> (tokens, rows) in the dtype of x."""
    few, many = few_and_many(spans_of(sizes))
    rows = stored["codes"].shape[-2]
    y = _few(form, stored, x, few, rows, table).to(x.dtype) if few else x.new_empty(len(x), rows)
    if many:
        planes = _in_planes(x.to(dtype_of_products(x.dtype)), form.bits)
    for e, start, stop in many:
        own = {kind: tensor[e] for kind, tensor in stored.items()}
        _by_tiles(form, own, planes[start:stop], y[start:stop], table)
    return y


def _few(form, stored: dict, x: torch.Tensor, spans: list[Span], rows: int, table) -> torch.Tensor:
    """y (tokens, rows) float32 of the tokens of `spans`; others are not set."""
    from .grid_numba import few, in_planes, plane_weights
    from .team import run

    blocks = -(-x.shape[1] // BLOCK)
    planes, y = torch.empty(len(x), blocks, PLANES, LANES), torch.empty(len(x), rows)
    in_planes(x.float().contiguous().numpy(), form.bits, plane_weights(form.bits), planes.numpy())
    tensors, sizes = _described(form, stored, table)
    given = [*tensors, planes, y, torch.tensor(spans), *sizes, blocks, len(x), len(spans)]
    run(few(form.bits, max(1, BLOCK // form.group_size)), given)
    return y


def _by_tiles(form, own: dict, planes: torch.Tensor, y: torch.Tensor, table) -> None:
    """Sets y (tokens, rows) from planes (tokens, columns in their order), by torch's product with one tile of rows
    after the other."""
    from .grid_numba import tile
    from .team import run

    tensors, (_, *sizes) = _described(form, {kind: tensor[None] for kind, tensor in own.items()}, table)
    (rows, columns), half = (y.shape[1], planes.shape[1]), int(planes.dtype == torch.bfloat16)
    room = torch.empty(min(rows, max(1, TILE // (planes.itemsize * columns))), columns, dtype=planes.dtype)
    for first in range(0, rows, len(room)):
        out = room[: rows - first]
        given = [*tensors, out, *sizes, columns // BLOCK, first, len(out)]
        run(tile(form.bits, max(1, BLOCK // form.group_size), half), given)
        y[:, first : first + len(out)] = F.linear(planes, out)


def _described(form, stored: dict, table: torch.Tensor) -> tuple[list, list[int]]:
    """The tensors and sizes of a bank, as compiled work takes them."""
    codes, levels, zeros = stored["codes"], stored["scales"], stored.get("zeros")
    tensors = codes, levels, stored["base"], zeros, table
    wide = max(1, form.group_size // BLOCK)
    sizes = [*codes.shape, levels.shape[2], 0 if zeros is None else zeros.shape[1], wide]
    return [0 if tensor is None else tensor for tensor in tensors], sizes


def _in_planes(x: torch.Tensor, bits: int) -> torch.Tensor:
    """(tokens, columns filled up to blocks), in the order of the tiles' columns."""
    padded = F.pad(x, (0, -x.shape[1] % BLOCK))
    return padded if bits == 8 else padded.view(len(x), -1, LANES, 8).transpose(2, 3).reshape(len(x), -1)
