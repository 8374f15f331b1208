"""Packing against Python's own integers, dequantization against the formula element by element."""

import pytest
import torch

from moesvd_quant.model.packing import bank_tensors, dequantize, pack, scale_levels, unpack


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
    quant = {"bits": bits, "group_size": size, "sym": sym}
    stored_zeros = None if sym else pack(zeros.flatten(), bits)
    got = dequantize(pack(codes, bits), levels, base.view(torch.int32), stored_zeros, quant, columns, torch.float64)
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
    tensors = bank_tensors("w", (2, 6, 100), {"bits": 3, "group_size": 64, "sym": False}, torch.bfloat16)
    assert tensors == {
        "w_codes": ((2, 6, 39), torch.uint8),
        "w_scales": ((2, 6, 2), torch.uint8),
        "w_base": ((2, 1), torch.int32),
        "w_zeros": ((2, 6), torch.uint8),  # 12 values: 2 times 8, 3 bits each
    }
    assert bank_tensors("w", (2, 6, 100), None, torch.bfloat16) == {"w": ((2, 6, 100), torch.bfloat16)}
