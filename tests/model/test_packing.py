"""Packing against Python's own integers, dequantization against the formula element by element."""

import pytest
import torch

from moesvd_quant.model.modeling_moesvd import bank_tensors, dequantize, pack, unpack


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
    scales = torch.rand(3, 3, generator=generator).half()
    quant = {"bits": bits, "group_size": size, "sym": sym}
    stored_zeros = None if sym else pack(zeros, bits)
    got = dequantize(pack(codes, bits), scales.view(torch.int16), stored_zeros, quant, columns, torch.float32)
    for i in range(3):
        for j in range(columns):
            zero = 2 ** (bits - 1) if sym else int(zeros[i, j // size])
            assert float(got[i, j]) == (int(codes[i, j]) - zero) * float(scales[i, j // size])


def test_bank_tensors_are_integers_where_packed():
    tensors = bank_tensors("w", (2, 6, 100), {"bits": 3, "group_size": 64, "sym": False}, torch.bfloat16)
    assert tensors == {
        "w_codes": ((2, 6, 39), torch.uint8),
        "w_scales": ((2, 6, 2), torch.int16),
        "w_zeros": ((2, 6, 3), torch.uint8),
    }
    assert bank_tensors("w", (2, 6, 100), None, torch.bfloat16) == {"w": ((2, 6, 100), torch.bfloat16)}
