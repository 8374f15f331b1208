"""Each formula of the layer sensitivity, computed another way."""

import pytest
import torch

from moesvd_quant.decompose.sensitivity import layer_sensitivity, principal_rank, sampling_frequency, select_layers


def test_principal_rank_counts_singular_values_above_the_threshold():
    basis, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    weight = basis * torch.tensor([100.0, 10.0, 1.01, 0.99, 0.1, 0.0], dtype=torch.float64) @ basis.T
    assert principal_rank(weight, 0.01) == 3
    assert principal_rank(weight, 1e-6) == 5


def test_frequency_and_sensitivity():
    frequency = sampling_frequency(torch.tensor([30, 10, 0]), 20)
    assert frequency.tolist() == [1.5, 0.5, 0.0]
    rank, outliers = torch.tensor([4.0, 3.0, 9.0]), torch.tensor([0.1, 0.2, 0.5])
    assert layer_sensitivity(frequency, rank, outliers) == pytest.approx(1.5 * 4 * 0.1 + 0.5 * 3 * 0.2)


def test_the_least_sensitive_layers_are_taken_until_the_ratio_is_met():
    scores = [5.0, 1.0, 3.0, 2.0]
    assert select_layers(scores, 0.2, halved=0.2) == [1]  # one layer of four gives 0.8 / 4
    assert select_layers(scores, 0.4, halved=0.2) == [1, 3]
    assert select_layers(scores, 0.9, halved=0.2) == [0, 1, 2, 3]
