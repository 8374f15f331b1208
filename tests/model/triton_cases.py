"""Products on a GPU, by Triton's interpreter, against dense matrices in float64: run by `test_triton_kernels.py`."""

import pytest
import torch

from moesvd_quant.runtime.grids import SCALES, Grid
from moesvd_quant.runtime.trellis import Trellis

SIZES = [[1, 0, 2], [0, 0, 0], [20, 3, 0]]


def bank(form, shape):
    generator = torch.Generator().manual_seed(0)
    stored = {}
    for kind, (size, dtype) in form.tensors((3, *shape), torch.float32).items():
        stored[kind] = torch.empty(size, dtype=dtype)
        form.random(kind, stored[kind], generator)
    return stored


def by_hand(form, stored, shape, x, sizes):
    dense = form.dequantize(stored, shape, torch.float32).double()
    return torch.cat([own.double() @ dense[e].T for e, own in enumerate(x.split(sizes))])


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_grids(bits, sym):
    from moesvd_quant.runtime import grid_triton

    for shape, group in (((33, 75), 16), ((64, 72), 128), ((40, 64), 32)):
        form = Grid(bits, group, sym)
        stored = bank(form, shape)
        stored["scales"] //= 4
        for sizes in SIZES:
            x = torch.randn(sum(sizes), shape[1], generator=torch.Generator().manual_seed(1))
            found = grid_triton.products(form, stored, x, sizes, SCALES)
            expected = by_hand(form, stored, shape, x, sizes)
            assert found.shape == expected.shape and found.dtype == x.dtype
            assert not len(x) or (found - expected).abs().max() <= 4e-6 * expected.abs().max()


@pytest.mark.parametrize("rate", [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0])
def test_trellis_codes(rate):
    for shape in ((272, 40), (16, 64), (48, 62), (30, 40)):
        form = Trellis(rate, True, True)
        stored = bank(form, shape)
        for sizes in SIZES:
            x = torch.randn(sum(sizes), shape[1], generator=torch.Generator().manual_seed(1))
            found = form._products_on_gpu(stored, shape, x, sizes)
            expected = by_hand(form, stored, shape, x, sizes)
            assert found.shape == expected.shape
            assert not len(x) or (found - expected).norm() <= 1e-5 * expected.norm()
