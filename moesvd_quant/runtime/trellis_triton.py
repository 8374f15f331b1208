"""Products with trellis codes on a GPU, in Triton. A copy lies in every checkpoint."""

import torch

try:  # what is imported outside of `try`, transformers demands before it opens a checkpoint
    import triton
    import triton.language as tl
except ImportError:
    raise

from .grid_triton import COLUMNS, ROWS, TOKENS, span_of_program
from .spans import spans_of
from .trellis_code import FACTOR, OFFSET, WINDOW


@triton.jit
def trellis_kernel(
    codes, places, firsts, x, spans, y, rows, columns, column_bytes, length,
    JOINT: tl.constexpr, MASK: tl.constexpr, FACTOR: tl.constexpr, OFFSET: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y[p] = values of matrix e @ x[p] for each span (e, first p, last p + 1); a program has some rows of one span.

    places (3, JOINT * length), firsts (JOINT * length): the bytes of each weight of JOINT columns, and its first bit.
    """
    e, start, stop = span_of_program(spans)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mine = r < rows
    for first in range(start, stop, TOKENS):
        t = first + tl.arange(0, TOKENS)
        total = tl.zeros((TOKENS, ROWS), tl.float32)
        for left in range(0, columns, COLUMNS):
            c = left + tl.arange(0, COLUMNS)
            there = mine[:, None] & (c < columns)[None, :]
            weight = (c % JOINT)[None, :] * length + r[:, None]
            stream = codes + (e * columns + c // JOINT * JOINT)[None, :] * column_bytes
            low = tl.load(stream + tl.load(places + weight, there, other=0), there, other=0).to(tl.uint32)
            at = tl.load(places + JOINT * length + weight, there, other=0)
            middle = tl.load(stream + at, there, other=0).to(tl.uint32)
            at = tl.load(places + 2 * JOINT * length + weight, there, other=0)
            high = tl.load(stream + at, there, other=0).to(tl.uint32)
            bit = tl.load(firsts + weight, there, other=0).to(tl.uint32)
            window = ((low | (middle << 8) | (high << 16)) >> bit) & MASK
            mixed = window * FACTOR + OFFSET
            pairs = (mixed & 0x0F0F0F0F) + ((mixed >> 4) & 0x0F0F0F0F)
            pairs = (pairs & 0xFFFF) + (pairs >> 16)
            value = ((pairs & 0xFF) + (pairs >> 8)).to(tl.float32) - 60
            given = (t < stop)[:, None] & (c < columns)[None, :]
            inputs = tl.load(x + t[:, None].to(tl.int64) * columns + c[None, :], given, other=0)
            total += tl.dot(inputs, tl.trans(value.to(inputs.dtype)), input_precision="ieee")
        tl.store(y + t[:, None].to(tl.int64) * rows + r[None, :], total, (t < stop)[:, None] & mine[None, :])


def products(
    codes: torch.Tensor, places: torch.Tensor, firsts: torch.Tensor, joint: int, rows: int, x: torch.Tensor,
    sizes: list[int],
) -> torch.Tensor:  # fmt: skip
    """x (tokens, columns), sorted by matrix, sizes[e] tokens of matrix e; codes uint8 (matrices, columns, bytes) ->
    float32 (tokens, rows): products with the values as they are stored. places, firsts: as `trellis.places_of` gives
    them for `joint` columns."""
    spans = spans_of(sizes)
    y = torch.empty(len(x), rows, dtype=torch.float32, device=x.device)
    if spans:
        asked = torch.tensor(spans, dtype=torch.int32, device=x.device)
        trellis_kernel[triton.cdiv(rows, ROWS), len(spans)](
            codes, places, firsts, x.contiguous(), asked, y, rows, x.shape[1], codes.shape[-1], len(firsts) // joint,
            JOINT=joint, MASK=2**WINDOW - 1, FACTOR=FACTOR, OFFSET=OFFSET, TOKENS=TOKENS, ROWS=ROWS, COLUMNS=COLUMNS,
        )  # fmt: skip
    return y
