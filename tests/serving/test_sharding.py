"""Experts over several processes: the shares of the outputs add up to the whole."""

import copy
from pathlib import Path

import pytest
import torch

from moesvd_quant.checkpoint.layout import dense_part, factor_part
from moesvd_quant.errors import ModelError
from moesvd_quant.model.experts import find_experts
from moesvd_quant.runtime.factorized_experts import FactorizedExperts
from moesvd_quant.runtime.grids import Grid
from moesvd_quant.runtime.parts import DensePart, Layout
from moesvd_quant.serving.vllm_plugin.sharding import require_splittable, split_experts
from tiny import fill_banks, tiny_model

FOLDER = Path("model")


def made(architecture, joint=True):
    """(experts in every kind of float part, a call of them)"""
    generator = torch.Generator().manual_seed(0)
    native = next(experts for _, experts in find_experts(tiny_model(architecture)))
    names = ["gate_up", "down"] if joint else ["gate", "up", "down"]
    parts = [factor_part([0, 2], 8), factor_part([1], 24, right=[0]), dense_part([3])]
    experts = FactorizedExperts(native, {name: copy.deepcopy(parts) for name in names}).double()
    fill_banks(experts, generator)
    count = experts.original_experts
    hidden = torch.randn(7, 64, generator=generator, dtype=torch.float64)
    index = torch.randint(0, count, (7, 2), generator=generator)
    return experts, (hidden, index, torch.rand(7, 2, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("joint", [True, False])
def test_shares_add_up(joint, processes):
    experts, call = made("mixtral", joint)
    whole = experts(*call)
    total, sizes = torch.zeros_like(whole), []
    for rank in range(processes):
        share = copy.deepcopy(experts)
        split_experts(share, rank, processes)
        total += share(*call)
        sizes.append({name: parameter.shape for name, parameter in share.named_parameters()})
    assert torch.allclose(total, whole, rtol=1e-12, atol=1e-12) and whole.abs().max() > 0.1
    assert sizes[0]["down_0_right"] == (2, 8, 96 // processes)  # the rank vector's other side stays whole
    assert sizes[0]["down_0_left"] == (2, 64, 8)


def test_what_cannot_be_split_is_refused():
    experts, _ = made("mixtral")
    with pytest.raises(ModelError, match="5 processes cannot share experts of 96 channels"):
        split_experts(experts, 0, 5)
    with pytest.raises(ModelError, match="biases"):
        split_experts(made("gpt_oss")[0], 0, 2)
    packed = dense_part([0])
    packed.formats = {"dense": Grid(4, 32, True)}
    layout = Layout("mixtral", {"model.layers.0.mlp.experts": {"down": [packed]}})
    require_splittable(FOLDER, layout, 1)
    with pytest.raises(ModelError, match="--tensor-parallel-size 2: weights that are packed cannot be split"):
        require_splittable(FOLDER, layout, 2)
    pruned = DensePart([0], [0], columns=8)
    with pytest.raises(ModelError, match="pruned by channels"):
        require_splittable(FOLDER, Layout("mixtral", {"model.layers.0.mlp.experts": {"down": [pruned]}}), 2)
