"""Format `sparse`: what is stored, and that it comes back as it was."""

import pytest
import torch

from moesvd_quant.decompose.sparsity import TWO_OF_FOUR, wanda_mask
from moesvd_quant.runtime.formats import format_from
from moesvd_quant.runtime.sparse import Sparse, SparseRows, pack_rows, pack_sparse


def bank(dtype, shape=(3, 5, 24)):
    """Matrices with half of their weights, and the bank's tensors."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    masks = torch.stack([wanda_mask(matrix, torch.ones(shape[2]), TWO_OF_FOUR) for matrix in weight])
    packed = [pack_sparse(matrix, mask) for matrix, mask in zip(weight, masks)]
    return weight * masks, {kind: torch.stack([one[kind] for one in packed]) for kind in packed[0]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bank_and_each_of_its_matrices_come_back_bit_for_bit(dtype):
    dense, stored = bank(dtype)
    form = format_from(Sparse(60).to_dict())
    assert torch.equal(form.dequantize(stored, (5, 24), dtype), dense)
    for row, matrix in enumerate(dense):
        own = {kind: tensor[row] for kind, tensor in stored.items()}
        assert torch.equal(form.dequantize(own, (5, 24), dtype), matrix)
    described = form.tensors(dense.shape, dtype)
    assert {kind: (tuple(t.shape), t.dtype) for kind, t in stored.items()} == described


def test_two_of_four_take_nine_sixteenths():
    dense, stored = bank(torch.bfloat16)
    size = sum(tensor.numel() * tensor.itemsize for tensor in stored.values())
    assert size == Sparse(60).bank_bytes(dense.shape, torch.bfloat16) == dense.numel() * 2 * 9 // 16


def test_columns_that_fill_no_byte_and_rows_of_different_counts():
    dense = torch.tensor([[0, 0, 0, 1.0, 2.0], [3.0, 0, 0, 4.0, 5.0]])
    stored = pack_sparse(dense, dense != 0)
    assert torch.equal(Sparse(5).dequantize(stored, (2, 5), torch.float32), dense)


def test_training_moves_the_values_and_no_zero():
    dense, stored = bank(torch.float32)
    values = Sparse(60).trainable(stored["values"]).requires_grad_(True)
    made = Sparse(60).dequantize(stored | {"values": values}, (5, 24), torch.float32)
    (made * 2).sum().backward()
    assert torch.equal(values.grad, torch.full_like(values, 2.0))
    assert torch.equal(made != 0, dense != 0)


def test_random_tensors_have_no_more_bits_than_values():
    mask = torch.empty(3, 5, 3, dtype=torch.uint8)
    Sparse(60).random("mask", mask, torch.Generator())
    bits = sum(bin(int(byte)).count("1") for byte in mask[0].flatten())
    assert 45 <= bits <= 60
    made = Sparse(60).dequantize({"mask": mask, "values": torch.randn(3, 60)}, (5, 24), torch.float32)
    assert made.count_nonzero() == 3 * bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_rows_come_back_bit_for_bit_and_take_a_bit_each(dtype):
    weight = torch.randn(3, 21, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows = torch.stack([torch.randperm(21, generator=torch.Generator().manual_seed(i)) < 8 for i in range(3)])
    dense, form = weight * rows[..., None], format_from(SparseRows(8).to_dict())
    packed = [pack_rows(matrix, own) for matrix, own in zip(weight, rows)]
    stored = {kind: torch.stack([one[kind] for one in packed]) for kind in packed[0]}
    assert torch.equal(form.dequantize(stored, (21, 24), dtype), dense)
    for row, one in enumerate(packed):
        assert torch.equal(form.dequantize(one, (21, 24), dtype), dense[row])
    described = form.tensors(dense.shape, dtype)
    assert {kind: (tuple(t.shape), t.dtype) for kind, t in stored.items()} == described
    assert form.bank_bytes(dense.shape, dtype) == 3 * (3 + 8 * 24 * dtype.itemsize)
    values = form.trainable(stored["values"]).requires_grad_(True)
    (form.dequantize(stored | {"values": values}, (21, 24), torch.float32) * 2).sum().backward()
    assert torch.equal(values.grad, torch.full_like(values, 2.0))
    drawn = torch.empty(3, 1, 3, dtype=torch.uint8)
    form.random("mask", drawn, torch.Generator())
    assert form.dequantize({"mask": drawn, "values": torch.randn(3, 8, 24)}, (21, 24), dtype).any(-1).sum() <= 3 * 8
