"""Products with trellis codes, by kernels, against dense matrices in float64."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moesvd_quant.quantize.registry import CODECS
from moesvd_quant.runtime import numba_here
from moesvd_quant.runtime.chains import chains_of
from moesvd_quant.runtime.factorized_experts import FactorizedExperts
from moesvd_quant.runtime.grids import Grid
from moesvd_quant.runtime.parts import DensePart, FactorPart
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
    monkeypatch.setattr(numba_here, "HERE", False)
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


@pytest.mark.slow
def test_what_numba_compiled_is_found_again_by_the_next_process():
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip() == "1 1"


def projection(experts, described):
    """Factorized experts with random weights: gate and up as one projection, of parts that `described` makes."""
    config = MixtralConfig(hidden_size=64, intermediate_size=48, num_local_experts=experts)
    parts = {"gate_up": described(96, 64), "down": described(64, 48)}
    made = FactorizedExperts(MixtralExperts(config), parts).eval()
    generator = torch.Generator().manual_seed(3)
    for name, (form, kind) in made.stored_tensors().items():
        form.random(kind, made._parameters[name], generator)
        if kind == "scale":
            tensor = made._parameters[name].view(torch.float32)
            tensor.copy_(torch.rand(tensor.shape, generator=generator) / 100)
    return made


def parts_of(out, inner):
    """Dense matrices of two rates, and factors that two experts share on the left; expert 4 has none."""
    whole = [
        DensePart([experts], [0], formats={"dense": Trellis(rate, True, True)}) for experts, rate in ((0, 3), (5, 1.5))
    ]
    factors = FactorPart([1, 2, 3], left=[0, 1, 1], right=[0, 1, 2], rank=32)
    factors.formats = {"left": Trellis(2.0, True, False), "right": Trellis(2.5, False, True)}
    return [*whole, factors]


def test_all_parts_of_a_projection_at_once_are_the_dense_matrices():
    experts = projection(6, parts_of)
    for tokens in (1, 7, 90):
        x = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(tokens))
        index = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(t))[:2] for t in range(tokens)])
        weights = torch.rand(tokens, 2)
        assert all(chains_of(experts, name, x) for name in experts.layout)
        expected = torch.zeros(tokens, 64, dtype=torch.float64)
        for t in range(tokens):
            for e, weight in zip(index[t].tolist(), weights[t]):
                gate, up = (experts.dense("gate_up", e).double() @ x[t].double()).chunk(2)
                inner = torch.nn.functional.silu(gate) * up
                expected[t] += weight * (experts.dense("down", e).double() @ inner)
        with torch.no_grad():
            assert relative(experts(x, index, weights), expected) < 1e-5
            assert relative(experts(x.bfloat16(), index, weights.bfloat16()), expected) < 0.02


def test_what_does_not_fit_together_is_taken_part_by_part():
    def apart(out, inner):
        turned, plain = Trellis(2.0, True, True), Trellis(2.0, False, True)
        return [DensePart([e], [0], formats={"dense": form}) for e, form in ((0, turned), (1, plain))]

    def mixed(out, inner):
        return [
            DensePart([e], [0], formats={"dense": form})
            for e, form in ((0, Trellis(2.0, True, True)), (1, Grid(4, 16, False)))
        ]

    x = torch.randn(3, 64)
    for described in (apart, mixed):
        assert not chains_of(projection(2, described), "gate_up", x)
    assert not chains_of(projection(6, parts_of), "gate_up", x.requires_grad_())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_processors_without_wide_vectors_get_the_same(tmp_path):
    """numba compiles for a CPU with AVX2 alone: without the instruction that sums bytes, and with vectors in halves."""
    kind = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma"}
    given = os.environ | kind | {"NUMBA_CACHE_DIR": str(tmp_path)}
    tests = [str(Path(__file__).with_name(f"test_{kind}_kernels.py")) for kind in ("grid", "trellis")]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-k", "dense_matrices", *tests]
    done = subprocess.run(command, capture_output=True, text=True, env=given, stdin=subprocess.DEVNULL)
    assert done.returncode == 0 and "100%" in done.stdout, done.stdout[-3000:]
