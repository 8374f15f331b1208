"""Packing against Python's own integers, dequantization against the formula element by element."""

import pytest
import torch

from moesvd_quant.runtime.formats import FLOAT
from moesvd_quant.runtime.grids import Grid, scale_levels
from moesvd_quant.runtime.packing import pack, unpack


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("columns", [8, 13, 64])
def test_eight_values_fill_bits_bytes_little_endian(bits, columns):
    values = torch.randint(0, 2**bits, (5, columns), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    packed = pack(values, bits)
    assert packed.shape == (5, -(-columns // 8) * bits)
    for row, stored in zip(values.tolist(), packed.tolist()):
        word = sum(value << bits * i for i, value in enumerate(row))
        assert bytes(stored) == word.to_bytes(len(stored), "little")
    assert torch.equal(unpack(packed, bits, columns), values)


@pytest.mark.parametrize("bits,sym", [(2, False), (3, True), (3, False), (4, False), (8, True)])
def test_dequantize_is_code_minus_zero_times_scale(bits, sym):
    generator = torch.Generator().manual_seed(1)
    columns, size = 40, 16  # the last group is short
    codes = torch.randint(0, 2**bits, (3, columns), generator=generator).to(torch.uint8)
    zeros = torch.randint(0, 2**bits, (3, 3), generator=generator).to(torch.uint8)
    levels = torch.randint(0, 256, (3, 3), generator=generator).to(torch.uint8)
    base = torch.tensor([0.37])
    form = Grid(bits, size, sym)
    stored = {"codes": pack(codes, bits), "scales": levels, "base": base.view(torch.int32)}
    stored |= {} if sym else {"zeros": pack(zeros.flatten(), bits)}
    got = form.dequantize(stored, (3, columns), torch.float64)
    for i in range(3):
        for j in range(columns):
            zero = 2 ** (bits - 1) if sym else int(zeros[i, j // size])
            scale = 0.37 * 2 ** (-int(levels[i, j // size]) / 16)
            assert float(got[i, j]) == pytest.approx((int(codes[i, j]) - zero) * scale, rel=1e-6)


def test_a_scale_is_stored_within_a_32nd_of_an_octave():
    scale = torch.rand(1000, generator=torch.Generator().manual_seed(0)).clamp(min=1e-3)
    stored = 2.0 ** (-scale_levels(scale, torch.tensor(1.0)).double() / 16)
    assert ((stored / scale).log2().abs() <= 1 / 32 + 1e-6).all()


def test_bank_tensors_are_integers_where_packed():
    tensors = Grid(3, 64, False).tensors((2, 6, 100), torch.bfloat16)
    assert tensors == {
        "codes": ((2, 6, 39), torch.uint8),
        "scales": ((2, 6, 2), torch.uint8),
        "base": ((2, 1), torch.int32),
        "zeros": ((2, 6), torch.uint8),  # 12 values: 2 times 8, 3 bits each
    }
    assert FLOAT.tensors((2, 6, 100), torch.bfloat16) == {"": ((2, 6, 100), torch.bfloat16)}
