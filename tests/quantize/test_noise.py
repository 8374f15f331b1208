"""The closed forms of quantization error against GPTQ itself."""

import pytest
import torch

from moesvd_quant.decompose.whitening import whitened_directions, whitened_error, whitened_svd
from moesvd_quant.quantize.factors import quantize_factors
from moesvd_quant.quantize.feedback import HessianFactor, conditional_variance
from moesvd_quant.quantize.gptq import gptq
from moesvd_quant.quantize.noise import ROUNDING, dense_noise, factor_noise
from moesvd_quant.quantize.registry import CODECS, Storage
from moesvd_quant.runtime.grids import Grid
from moesvd_quant.stages.gptq import Gptq

DAMP = 0.05


def problem(out=96, columns=128, seed=0):
    """A weight of falling spectrum and correlated inputs, as trained models have them."""
    generator = torch.Generator().manual_seed(seed)
    decay = torch.exp(-torch.arange(min(out, columns)) / 20.0)
    weight = (
        torch.randn(out, len(decay), generator=generator)
        * decay
        @ torch.randn(len(decay), columns, generator=generator)
    )
    x = torch.randn(3000, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return weight.double(), (x.T @ x).double() / 3000


def test_innovation_is_what_later_inputs_do_not_explain():
    _, gram = problem()
    order = gram.diagonal().argsort(descending=True)
    found = conditional_variance(gram, 0.0)
    for step, j in enumerate(order):  # residual variance of a regression on the inputs that come later
        later = order[step + 1 :]
        cross = gram[j, later]
        explained = cross @ torch.linalg.solve(gram[later][:, later], cross) if len(later) else 0.0
        assert float(found[j]) == pytest.approx(float(gram[j, j] - explained), rel=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_of_a_gaussian(bits):
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    packed = gptq(weight, HessianFactor.of(torch.eye(512), 1e-6), Grid(bits, 64, False))
    assert float((packed.dense(torch.float32) - weight).square().mean()) == pytest.approx(ROUNDING[bits], rel=0.05)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_dense_error_is_forecast(bits):
    weight, gram = problem()
    packed = gptq(weight, HessianFactor.of(gram, DAMP), Grid(bits, 64, False))
    measured = whitened_error(weight, packed.dense(), gram) * float(((weight @ gram) * weight).sum())
    forecast = ROUNDING[bits] * dense_noise(
        float(weight.square().sum()), 128, float(conditional_variance(gram, DAMP).sum())
    )
    assert measured == pytest.approx(forecast, rel=0.2)


@pytest.mark.parametrize("rate", CODECS["trellis"].rates)
def test_errors_of_trellis_codes_are_forecast(rate):
    weight, gram = problem(256, 192, seed=1)
    codec, storage = Gptq(format="trellis", damp=DAMP).codec(), Storage(rate, "trellis")
    whole, energy = codec.form(storage, 192), float(((weight @ gram) * weight).sum())
    spread = float(conditional_variance(gram, DAMP).sum())
    measured = whitened_error(weight, codec.pack(weight, codec.inputs(gram, whole), whole).dense(), gram) * energy
    assert measured == pytest.approx(
        codec.noise(whole) * dense_noise(float(weight.square().sum()), 192, spread), rel=0.12
    )
    left, right = whitened_svd(weight, gram, 32)
    forms = {"left": codec.form(storage, 32, "left"), "right": codec.form(storage, 192, "right")}
    lefts, rights = quantize_factors([weight], [gram], left[None], right[None], [0], [0], forms, codec, seed=0)
    truncated = whitened_error(weight, left @ right, gram)
    measured = (whitened_error(weight, lefts[0].dense() @ rights[0].dense(), gram) - truncated) * energy
    spectrum, _, rows = whitened_directions(weight, gram, min(weight.shape))
    forecast = codec.noise(forms["right"]) * factor_noise(spectrum, rows.norm(dim=1), 192, spread, DAMP)[31]
    assert 0.75 < measured / float(forecast) < 1.25


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("rank", [32, 64])
def test_factor_error_is_forecast(bits, rank):
    weight, gram = problem()
    left, right = whitened_svd(weight, gram, rank)
    quant = {bank: Grid(bits, 32, False) for bank in ("left", "right")}
    lefts, rights = quantize_factors(
        [weight], [gram], left[None], right[None], [0], [0], quant, Gptq(damp=DAMP).codec(), seed=0
    )
    energy = float(((weight @ gram) * weight).sum())
    truncated = whitened_error(weight, left @ right, gram)
    measured = (whitened_error(weight, lefts[0].dense() @ rights[0].dense(), gram) - truncated) * energy
    spectrum, _, rows = whitened_directions(weight, gram, min(weight.shape))
    spread = float(conditional_variance(gram, DAMP).sum())
    forecast = ROUNDING[bits] * factor_noise(spectrum, rows.norm(dim=1), 128, spread, DAMP)[rank - 1]
    assert 0.5 < measured / float(forecast) < 1.5
