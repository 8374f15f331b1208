"""The forecast's parts against truncation really done, and the whole against the divergence it causes."""

import pytest
import torch

from moesvd_quant.allocate import DENSE
from moesvd_quant.decompose.whitening import whitened_svd
from moesvd_quant.probe.forecast import kept_energy, log_perplexity, lost_energy, output_energy


def gram(size, seed):
    x = torch.randn(200, size, generator=torch.Generator().manual_seed(seed)).double() * torch.linspace(3, 0.1, size)
    return x.T @ x


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_lost_energy_is_that_of_the_factors(shape):
    """What is kept under another metric than that which the energy is measured in, at every rank."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    metric, inputs = gram(shape[1], 1), gram(shape[1], 2)
    kept, total = kept_energy(weight, metric, inputs), output_energy(weight, inputs)
    for rank in (1, 5, 12):
        left, right = whitened_svd(weight, metric, rank)
        truth = output_energy(weight - left @ right, inputs)
        assert lost_energy([kept], [total], [rank]) == pytest.approx(truth, rel=1e-6, abs=1e-6 * total)
    assert lost_energy([kept], [total], [DENSE]) == 0
    assert lost_energy([kept], [total], [0]) == pytest.approx(total)


def test_effects_are_priced_by_energy_and_add_up():
    lost, rounded = {"a": 2.0, "b": 3.0}, {"a": 4.0, "b": 1.0}
    assert log_perplexity(lost, rounded, {"a": 0.1, "b": 0.01}) == pytest.approx(0.1 / 2 + 0.03)
    assert log_perplexity({"a": 1.0}, {"a": 0.0}, {"a": 1.0}) == 0  # rounding cost nothing: nothing is known
