"""Channels that go: their cost and the refit of down, against least squares on the inputs themselves."""

import numpy as np
import pytest
import torch

from moesvd_quant.decompose.channels import channel_losses, refit_down

DAMP = 1e-9


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(400, 12, generator=generator) @ torch.randn(12, 12, generator=generator)).double()


@pytest.fixture
def down():
    return torch.randn(7, 12, generator=torch.Generator().manual_seed(1)).double()


def test_down_is_the_least_squares_of_what_all_channels_gave(inputs, down):
    kept = torch.tensor([0, 3, 4, 8, 11])
    expected = np.linalg.lstsq(inputs[:, kept].numpy(), (inputs @ down.T).numpy(), rcond=None)[0].T
    assert np.allclose(refit_down(down, inputs.T @ inputs, kept, DAMP).numpy(), expected, atol=1e-6)


def test_all_channels_are_what_they_were(inputs, down):
    assert torch.allclose(refit_down(down, inputs.T @ inputs, torch.arange(12), 0.1), down)


def test_a_loss_is_what_is_left_when_the_others_have_made_up(inputs, down):
    losses = channel_losses(down, inputs.T @ inputs, DAMP)
    for gone in range(12):
        rest = [channel for channel in range(12) if channel != gone]
        residual = np.linalg.lstsq(inputs[:, rest].numpy(), (inputs @ down.T).numpy(), rcond=None)[1]
        assert float(losses[gone]) == pytest.approx(float(residual.sum()), rel=1e-5)


def test_a_channel_that_says_what_another_says_costs_nothing(inputs, down):
    inputs[:, 5] = 3 * inputs[:, 2]
    gram = inputs.T @ inputs
    assert set(channel_losses(down, gram, DAMP).argsort()[:2].tolist()) == {2, 5}
    kept = torch.tensor([channel for channel in range(12) if channel != 5])
    assert torch.allclose(inputs[:, kept] @ refit_down(down, gram, kept, DAMP).T, inputs @ down.T, atol=1e-4)


def test_without_inputs_columns_stay(down):
    kept = torch.tensor([1, 2, 6])
    assert torch.equal(refit_down(down, torch.zeros(12, 12), kept, 0.01), down[:, kept])
