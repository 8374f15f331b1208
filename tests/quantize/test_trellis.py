"""Trellis codes: the search against one that tries every path, the feedback, and what the format promises."""

import itertools

import numpy as np
import pytest
import torch

from moesvd_quant.decompose.whitening import whitened_error, whitened_svd
from moesvd_quant.quantize.factors import quantize_factors
from moesvd_quant.quantize.feedback import HessianFactor
from moesvd_quant.quantize.registry import CODECS, Storage
from moesvd_quant.quantize.trellis_codec import CODES, UNIT, inflation
from moesvd_quant.quantize.viterbi import Encoder
from moesvd_quant.runtime.trellis import Trellis, read_windows
from moesvd_quant.runtime.trellis_code import FACTOR, OFFSET, VALUES, padded, ring_bounds
from moesvd_quant.runtime.turning import hadamard, turn, turn_back
from moesvd_quant.stages.gptq import Gptq

pytestmark = pytest.mark.usefixtures("two_threads")

RATES = CODECS["trellis"].rates


def problem(out, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(4 * columns, columns, generator=generator, dtype=torch.float64)
    x = x @ (torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5)
    return weight, x.T @ x


def codec_of(name):
    return Gptq(format=name).codec()


def encoded(targets, rate, threads=1):
    """(values, codes) of targets (columns, rows), no input of which has to do with another."""
    count = len(targets)
    white = HessianFactor(torch.arange(count), torch.eye(count), torch.ones(count, dtype=torch.float64))
    codes = Encoder(rate, threads).encode(targets, white)
    return read_windows(codes, rate, targets.shape[1]), codes


def windows_of(ring: bytes, rate: float, count: int) -> list[int]:
    """By the definition: 12 neighbouring bits of a ring, the first the lowest, from bit floor(t rate) on."""
    bits = [byte >> place & 1 for byte in ring for place in range(8)]
    return [sum(bits[(int(t * rate) + i) % len(bits)] << i for i in range(12)) for t in range(count)]


@pytest.mark.parametrize("rate", RATES)
def test_codes_are_read_as_windows_of_a_ring(rate):
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 256, (2, int(32 * rate) // 8), generator=generator).to(torch.uint8)
    found = read_windows(codes, rate, 32)  # two columns of 32 weights share a ring
    expected = [VALUES[w] for w in windows_of(codes.numpy().tobytes(), rate, 64)]
    assert found.flatten().tolist() == expected


def test_values_are_sums_of_hexadecimal_digits():
    for window in (0, 1, 77, 4095):
        digits = f"{(window * FACTOR + OFFSET) % 2**32:08x}"
        assert VALUES[window] == sum(int(digit, 16) for digit in digits) - 60


def test_no_other_ring_that_meets_in_the_same_bits_is_better():
    targets = torch.randn(1, 16, generator=torch.Generator().manual_seed(1)) / UNIT
    targets = (targets * 8).round() / 8
    values, codes = encoded(targets, 1.0)
    chosen = [byte >> place & 1 for byte in codes.flatten().tolist() for place in range(8)]
    # The last window and the first share eleven bits, which the first pass finds. The second is exact beside them.
    errors = []
    for rest in itertools.product((0, 1), repeat=5):
        ring = [rest[0], *chosen[1:12], *rest[1:]]
        windows = [sum(ring[(t + i) % 16] << i for i in range(12)) for t in range(16)]
        errors.append(float((torch.from_numpy(VALUES)[windows] - targets).square().sum()))
    got = float((values - targets).square().sum())
    assert got == min(errors) and len(set(errors)) > 16


@pytest.mark.parametrize("rows,columns", [(256, 8), (272, 3), (48, 10), (16, 8), (32, 5), (37, 4), (176, 2)])
@pytest.mark.parametrize("rate", [1.0, 1.5, 3.5])
def test_what_the_search_chose_is_what_is_read(rows, columns, rate):
    bounds = ring_bounds(rows, columns)
    assert np.all(np.diff(bounds) % 16 == 0) and bounds[-1] == columns * padded(rows)
    targets = torch.randn(columns, rows, generator=torch.Generator().manual_seed(2)) / UNIT
    values, codes = encoded(targets, rate)
    assert codes.numel() * 8 == rate * columns * padded(rows)  # not a bit more
    # Were a single ring not read as it was written, its weights would have nothing to do with the targets.
    errors = (values - targets).square().mean(1) * UNIT**2
    assert errors.max() < {1.0: 0.6, 1.5: 0.35, 3.5: 0.05}[rate]


def test_threads_change_nothing():
    targets = torch.randn(3, 1024, generator=torch.Generator().manual_seed(2)) / UNIT
    assert torch.equal(encoded(targets, 2.0, 1)[1], encoded(targets, 2.0, 2)[1])


@pytest.mark.parametrize("rate", RATES)
def test_the_forecast_error_is_that_of_unit_gaussians(rate):
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(7))
    unit = CODES[rate].spread * UNIT
    error = float((encoded(x / unit, rate)[0] * unit - x).square().mean())
    assert error == pytest.approx(CODES[rate].error, rel=0.03)
    shannon = 4.0**-rate
    assert shannon < error < 1.5 * shannon


def test_turning_is_orthogonal_and_exact_in_whole_numbers():
    x = torch.randn(3, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(turn(x).norm(dim=1), x.norm(dim=1)) and torch.allclose(turn_back(turn(x)), x)
    assert not torch.allclose(turn(x), x)
    matrix = hadamard(64, torch.float64, torch.device("cpu"))
    assert torch.equal(matrix @ matrix.T, 64 * torch.eye(64, dtype=torch.float64))


@pytest.mark.parametrize("rows,columns", [(64, 48), (176, 40), (37, 20), (16, 64)])
@pytest.mark.parametrize("sides", [(True, True), (False, True), (True, False)])
def test_dequantizing_turns_back_what_was_coded(rows, columns, sides):
    form = Trellis(2.0, *sides)
    tensors = {k: torch.empty(s, dtype=d) for k, (s, d) in form.tensors((2, rows, columns), torch.float32).items()}
    generator = torch.Generator().manual_seed(5)
    for kind, tensor in tensors.items():
        form.random(kind, tensor, generator)
    got = form.dequantize(tensors, (rows, columns), torch.float64)
    assert got.is_contiguous()
    for one, matrix in enumerate(got):
        values = read_windows(tensors["codes"][one], 2.0, rows).double()  # (columns, rows), as they are stored
        expected = (turn_back(values) if sides[0] else values).T
        expected = turn_back(expected) if sides[1] else expected
        assert torch.allclose(matrix, expected * 0.001, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("rows,columns", [(128, 96), (272, 100), (48, 64), (16, 64)])
def test_half_of_the_grids_error_in_fewer_bytes(rows, columns):
    weight, gram = problem(rows, columns)
    lost, size = {}, {}
    for name in ("grid", "trellis"):
        codec = codec_of(name)
        form = codec.form(Storage(2, name), columns)
        made = codec.pack(weight, codec.inputs(gram, form), form)
        lost[name], size[name] = whitened_error(weight, made.dense(), gram), form.bank_bytes(weight.shape, torch.half)
        assert sum(t.numel() * t.element_size() for t in made.tensors.values()) == size[name]
    assert lost["trellis"] < 0.65 * lost["grid"] and size["trellis"] < size["grid"]


def test_feedback_is_worth_what_the_conditional_variances_say():
    weight, gram = problem(256, 128)
    codec = codec_of("trellis")
    form = codec.form(Storage(2, "trellis"), 128)
    inputs = codec.inputs(gram, form)
    with_feedback = codec.pack(weight, inputs, form).dense()
    without = codec.pack(weight, codec.inputs(torch.eye(128, dtype=torch.float64), form), form).dense()
    expected = float(inputs.conditional_variance.sum()) / 128  # of inputs with a mean variance of 1
    ratio = whitened_error(weight, with_feedback, gram) / whitened_error(weight, without, gram)
    assert ratio == pytest.approx(expected, rel=0.15)


def test_outlying_channels_cost_less_than_under_grids():
    """Inputs and outputs that are 20 times larger than all others: turning spreads them over their block."""
    weight, gram = problem(256, 128)
    large = torch.ones(128, dtype=torch.float64)
    large[[3, 77]] = 20
    weight = weight * large
    weight[[5, 200]] *= 20
    lost = {}
    for name in ("grid", "trellis"):
        codec = codec_of(name)
        form = codec.form(Storage(2, name), 128)
        made = codec.pack(weight, codec.inputs(gram, form), form).dense()
        lost[name] = whitened_error(weight, made, gram)
    assert lost["trellis"] < 0.6 * lost["grid"]


def test_factors_in_turn_lose_less_than_on_grids():
    weight, gram = problem(128, 96)
    left, right = (factor[None] for factor in whitened_svd(weight, gram, 32))
    best = left[0] @ right[0]
    lost = {}
    for name in ("grid", "trellis"):
        codec = codec_of(name)
        storage = Storage(2, name)
        forms = {"left": codec.form(storage, 32, "left"), "right": codec.form(storage, 96, "right")}
        lefts, rights = quantize_factors([weight], [gram], left, right, [0], [0], forms, codec, seed=0)
        product = lefts[0].dense() @ rights[0].dense()
        lost[name] = whitened_error(weight, product, gram) - whitened_error(weight, best, gram)
    assert forms["left"] == Trellis(2.0, rows=True, columns=False)
    assert forms["right"] == Trellis(2.0, rows=False, columns=True)
    assert lost["trellis"] < 0.85 * lost["grid"]


def test_inflation_is_what_feedback_adds():
    _, gram = problem(8, 32)
    codec = codec_of("trellis")
    inputs = codec.inputs(gram, codec.form(Storage(1, "trellis"), 32))
    error, upper = 0.276, inputs.upper.double()
    # Errors of variance `error` come in from every earlier input, each with its own share.
    by_hand = [1 + error * sum(float(upper[i, j]) ** 2 for i in range(j)) for j in range(32)]
    assert inflation(inputs, error) == pytest.approx((sum(by_hand) / 32) ** 0.5)


def test_a_matrix_of_zeros_and_one_that_is_not_finite():
    codec = codec_of("trellis")
    form = codec.form(Storage(2, "trellis"), 32)
    inputs = codec.inputs(torch.eye(32, dtype=torch.float64), form)
    assert codec.pack(torch.zeros(64, 32), inputs, form).dense().abs().max() < 1e-25
    with pytest.raises(ValueError, match="not finite"):
        codec.pack(torch.full((64, 32), float("nan")), inputs, form)


def test_without_numba_codes_are_read_all_the_same(monkeypatch):
    form = Trellis(1.5, True, True)
    tensors = {k: torch.empty(s, dtype=d) for k, (s, d) in form.tensors((2, 80, 24), torch.float32).items()}
    for kind, tensor in tensors.items():
        form.random(kind, tensor, torch.Generator().manual_seed(5))
    expected = form.dequantize(tensors, (80, 24), torch.float32)
    monkeypatch.setattr("moesvd_quant.runtime.numba_here.HERE", False)
    assert torch.equal(form.dequantize(tensors, (80, 24), torch.float32), expected)
