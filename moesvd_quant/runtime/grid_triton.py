"""Products with packed grids on a GPU, in Triton. A copy lies in every checkpoint."""

import torch

try:  # what is imported outside of `try`, transformers demands before it opens a checkpoint
    import triton
    import triton.language as tl
except ImportError:
    raise

from .spans import spans_of

TOKENS, ROWS, COLUMNS = 16, 32, 64  # of a tile: the least that the units for matrices take, and what fits registers


@triton.jit
def span_of_program(spans):
    """The matrix of a program, its first token and the one after its last."""
    place = spans + 3 * tl.program_id(1)
    return tl.load(place).to(tl.int64), tl.load(place + 1), tl.load(place + 2)


@triton.jit
def grid_kernel(
    codes, levels, base, zeros, table, x, spans, y, rows, columns, groups, row_bytes, zero_bytes,
    BITS: tl.constexpr, GROUP: tl.constexpr, SYM: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y[p] = weight of matrix e @ x[p] for each span (e, first p, last p + 1); a program has some rows of one span."""
    e, start, stop = span_of_program(spans)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mine, line = r < rows, (e * rows + r)
    largest = tl.load(base + e)
    for first in range(start, stop, TOKENS):
        t = first + tl.arange(0, TOKENS)
        total = tl.zeros((TOKENS, ROWS), tl.float32)
        for left in range(0, columns, COLUMNS):
            c = left + tl.arange(0, COLUMNS)
            there = mine[:, None] & (c < columns)[None, :]
            bit = c * BITS
            place = codes + line[:, None] * row_bytes + (bit // 8)[None, :]
            word = tl.load(place, there, other=0).to(tl.int32)
            if BITS == 3:  # codes cross bytes
                more = there & (bit // 8 + 1 < row_bytes)[None, :]
                word |= tl.load(place + 1, more, other=0).to(tl.int32) << 8
            code = ((word >> (bit % 8)[None, :]) & ((1 << BITS) - 1)).to(tl.float32)
            g = (c // GROUP)[None, :]
            level = tl.load(levels + line[:, None] * groups + g, there, other=0).to(tl.int32)
            scale = tl.load(table + level) * largest
            if SYM:
                code -= 1 << (BITS - 1)
            else:
                at = (r[:, None] * groups + g) * BITS
                low = tl.load(zeros + e * zero_bytes + at // 8, there, other=0).to(tl.int32)
                more = there & (at // 8 + 1 < zero_bytes)
                high = tl.load(zeros + e * zero_bytes + at // 8 + 1, more, other=0).to(tl.int32)
                code -= (((low | (high << 8)) >> (at % 8)) & ((1 << BITS) - 1)).to(tl.float32)
            given = (t < stop)[:, None] & (c < columns)[None, :]
            inputs = tl.load(x + t[:, None].to(tl.int64) * columns + c[None, :], given, other=0)
            total += tl.dot(inputs, tl.trans((code * scale).to(inputs.dtype)), input_precision="ieee")
        tl.store(y + t[:, None].to(tl.int64) * rows + r[None, :], total, (t < stop)[:, None] & mine[None, :])


def products(form, stored: dict, x: torch.Tensor, sizes: list[int], table: torch.Tensor) -> torch.Tensor:
    """x (tokens, columns), sorted by matrix, sizes[e] tokens of matrix e -> (tokens, rows) in the dtype of x."""
    codes, levels = stored["codes"], stored["scales"]
    (_, rows, row_bytes), groups = codes.shape, levels.shape[-1]
    spans = spans_of(sizes)
    y = torch.empty(len(x), rows, dtype=torch.float32, device=x.device)
    zeros = codes if form.sym else stored["zeros"]
    if spans:
        asked = torch.tensor(spans, dtype=torch.int32, device=x.device)
        grid_kernel[triton.cdiv(rows, ROWS), len(spans)](
            codes, levels, stored["base"].view(torch.float32), zeros, table.to(x.device), x.contiguous(), asked, y,
            rows, x.shape[1], groups, row_bytes, zeros.shape[-1],
            BITS=form.bits, GROUP=form.group_size, SYM=form.sym, TOKENS=TOKENS, ROWS=ROWS, COLUMNS=COLUMNS,
        )  # fmt: skip
    return y.to(x.dtype)
