"""Products with trellis codes, by kernels, against dense matrices in float64."""

import subprocess
import sys

import pytest
import torch

from moesvd_quant.quantize.registry import CODECS
from moesvd_quant.runtime import trellis_kernels
from moesvd_quant.runtime.trellis import Trellis

pytestmark = pytest.mark.usefixtures("two_threads")

SHAPES = [(256, 96), (272, 100), (192, 64), (16, 64), (48, 62), (32, 33), (40, 30), (1408, 32), (37, 20)]
SIDES = [(True, True), (False, True), (True, False)]


def bank(form, shape, matrices=3):
    generator = torch.Generator().manual_seed(4)
    tensors = form.tensors((matrices, *shape), torch.float32)
    stored = {kind: torch.empty(size, dtype=dtype) for kind, (size, dtype) in tensors.items()}
    for kind, tensor in stored.items():
        form.random(kind, tensor, generator)
    stored["scale"].view(torch.float32).copy_(torch.arange(1, matrices + 1)[:, None] / 1000)
    return stored


def by_hand(form, stored, shape, x, sizes):
    dense = form.dequantize(stored, shape, torch.float64)
    return torch.cat([own.double() @ dense[e].T for e, own in enumerate(x.split(sizes))])


def relative(found, expected):
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-30))


@pytest.mark.parametrize("rate", CODECS["trellis"].rates)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_the_dense_matrices(rate, shape):
    for sides in SIDES:
        form = Trellis(float(rate), *sides)
        stored = bank(form, shape)
        for sizes in ([1, 0, 20], [3, 15, 2], [0, 0, 1]):
            x = torch.randn(sum(sizes), shape[1], generator=torch.Generator().manual_seed(6))
            assert form.has_kernel(stored, x)
            expected = by_hand(form, stored, shape, x, sizes)
            assert relative(form.products(stored, shape, x, sizes), expected) < 1e-5
            half = form.products(stored, shape, x.bfloat16(), sizes)
            assert half.dtype == torch.bfloat16 and relative(half, expected) < 0.01


def test_no_token_at_all():
    form = Trellis(2.0, True, True)
    assert form.products(bank(form, (64, 32)), (64, 32), torch.empty(0, 32), [0, 0, 0]).shape == (0, 64)


def test_where_kernels_do_not_serve_the_matrix_is_made(monkeypatch):
    form, shape = Trellis(2.0, True, True), (64, 32)
    stored = bank(form, shape)
    x = torch.randn(3, 32, requires_grad=True)
    expected = by_hand(form, stored, shape, x, [1, 2, 0])
    y = form.products(stored, shape, x, [1, 2, 0])
    assert relative(y.detach(), expected.detach()) < 1e-5
    y.sum().backward()
    assert x.grad is not None
    monkeypatch.setattr(trellis_kernels, "HERE", False)
    with torch.no_grad():
        assert relative(form.products(stored, shape, x.detach(), [1, 2, 0]), expected) < 1e-5


COMPILED = """
import torch
from moesvd_quant.runtime.grids import Grid
from moesvd_quant.runtime.trellis import Trellis
from moesvd_quant.runtime import grid_numba, trellis_numba
for form in (Grid(2, 32, False), Trellis(2.0, True, True)):
    stored = {}
    for kind, (size, dtype) in form.tensors((1, 64, 32), torch.float32).items():
        stored[kind] = torch.empty(size, dtype=dtype)
        form.random(kind, stored[kind], torch.Generator().manual_seed(0))
    form.products(stored, (64, 32), torch.randn(2, 32), [2])
print(grid_numba.few(2, 4).cache_hits, trellis_numba.few(4).cache_hits)
"""


def test_what_numba_compiled_is_found_again_by_the_next_process():
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip() == "1 1"
