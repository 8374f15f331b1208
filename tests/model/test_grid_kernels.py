"""Products with packed grids against dense ones in float64, and that it is kernels that make them."""

import pytest
import torch
import torch.nn.functional as F

from moesvd_quant.runtime import grid_kernels
from moesvd_quant.runtime.formats import Format
from moesvd_quant.runtime.grids import Grid
from moesvd_quant.runtime.parts import LinearLayout
from moesvd_quant.runtime.spans import MANY
from moesvd_quant.runtime.stored import StoredLinear

pytestmark = pytest.mark.usefixtures("two_threads")

# Rows, columns, group size: odd ones, a short last group, columns that fill no word, a rank.
SHAPES = [(96, 64, 32), (33, 75, 16), (64, 72, 128), (300, 256, 64), (16, 24, 8), (1, 8, 8)]
# Tokens of each of three matrices: one, none, four at a time and what is left, many.
SIZES = [[1, 0, 2], [0, 0, 0], [0, 9, 0], [4, 5, MANY - 1], [MANY, 1, 3 * MANY]]


def random_bank(form: Grid, rows: int, columns: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    stored = {}
    for kind, (shape, dtype) in form.tensors((3, rows, columns), torch.float32).items():
        stored[kind] = torch.empty(shape, dtype=dtype)
        form.random(kind, stored[kind], generator)
    stored["scales"] //= 4  # scales of one size, so that every group counts
    return stored


def by_hand(form, stored, columns, x, sizes) -> torch.Tensor:
    shape = stored["scales"].shape[-2], columns
    dense = form.dequantize(stored, shape, torch.float32).double()
    return torch.cat([own.double() @ dense[e].T for e, own in enumerate(x.split(sizes))])


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_products_are_those_of_the_dense_matrices(bits, sym):
    for rows, columns, size in SHAPES:
        form = Grid(bits, size, sym)
        stored = random_bank(form, rows, columns)
        for sizes in SIZES:
            x = torch.randn(sum(sizes), columns, generator=torch.Generator().manual_seed(1))
            assert form.has_kernel(stored, x)
            expected = by_hand(form, stored, columns, x, sizes)
            found = form.products(stored, (rows, columns), x, sizes)
            assert found.shape == expected.shape and found.dtype == x.dtype
            if len(x):
                assert (found - expected).abs().max() <= 4e-6 * expected.abs().max(), (rows, columns, size, sizes)
            half = form.products(stored, (rows, columns), x.bfloat16(), sizes)
            assert half.dtype == torch.bfloat16
            if len(x):
                exact = by_hand(form, stored, columns, x.bfloat16(), sizes)
                assert (half - exact).abs().max() <= 2e-2 * exact.abs().max()


def test_no_dense_matrix_is_made(monkeypatch):
    form = Grid(4, 32, False)
    stored, x = random_bank(form, 64, 64), torch.randn(5, 64)
    monkeypatch.setattr(Grid, "dequantize", None)
    form.products(stored, (64, 64), x, [2, 0, 3])
    with pytest.raises(TypeError):  # with gradients it is
        form.products(stored, (64, 64), x.requires_grad_(), [2, 0, 3])


def test_without_numba_and_with_gradients_matrices_are_dequantized(monkeypatch):
    form = Grid(3, 32, False)
    stored, x = random_bank(form, 40, 64), torch.randn(7, 64)
    expected = by_hand(form, stored, 64, x, [2, 0, 5])
    with_kernel = form.products(stored, (40, 64), x, [2, 0, 5])
    monkeypatch.setattr(grid_kernels, "HERE", False)
    assert not form.has_kernel(stored, x)
    for found in (with_kernel, form.products(stored, (40, 64), x, [2, 0, 5])):
        assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert form.products(stored, (40, 64), x[:0], [0, 0, 0]).shape == (0, 40)
    y = form.products(stored, (40, 64), x.requires_grad_(), [2, 0, 5])
    y.sum().backward()
    assert torch.isfinite(x.grad).all() and form.products.__func__ is not Format.products


def test_a_packed_linear_and_a_tensor_at_an_odd_address():
    form = Grid(4, 32, False)
    linear = StoredLinear(64, 48, True, LinearLayout(form), torch.float32)
    bank = random_bank(form, 48, 64)
    for kind, tensor in bank.items():
        raw = torch.empty(tensor[0].numel() * tensor.element_size() + 4, dtype=torch.uint8)[4:]  # no whole cache line
        odd = raw.view(tensor.dtype).view(tensor[0].shape).copy_(tensor[0])
        linear._parameters[f"weight_{kind}"].data = odd
    torch.nn.init.normal_(linear.bias)
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        expected = F.linear(
            x, form.dequantize({k: t[0] for k, t in bank.items()}, (64, 64), torch.float32), linear.bias
        )
        assert torch.allclose(linear(x), expected, rtol=1e-5, atol=1e-5)
