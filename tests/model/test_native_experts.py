"""Looking at a module changes nothing of it; what cannot be understood is refused."""

import pytest
import torch
from torch import nn

from moesvd_quant.model.experts import find_experts, flags_of, split_projections, unknown_experts
from tiny import ARCHITECTURES, tiny_model


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_looking_for_experts_changes_no_module(architecture):
    model = tiny_model(architecture)
    before = {path: dict(vars(module)) for path, module in model.named_modules()}
    found = [experts for layer in model.model.layers for _, experts in find_experts(layer)]
    for experts in found:
        flags_of(experts)
        split_projections(experts)
    assert found
    for path, module in model.named_modules():
        assert vars(module).keys() == before[path].keys(), path


class UpOnlyExperts(nn.Module):
    """Experts of two matrices each, in a class that does not say which way round they are."""

    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj = nn.Parameter(torch.randn(3, 24, 16)), nn.Parameter(torch.randn(3, 16, 24))
        self.act_fn = nn.GELU()

    def forward(self, hidden, index, weights): ...


def test_experts_whose_orientation_nobody_can_tell_are_refused_by_class_and_shapes():
    layer = nn.ModuleDict({"experts": UpOnlyExperts()})
    assert not list(find_experts(layer))
    ((path, why),) = unknown_experts(layer)
    assert path == "experts" and "UpOnlyExperts" in why and "(3, 24, 16)" in why
