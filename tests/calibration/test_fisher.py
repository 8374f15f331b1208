"""Fisher information from the layer-wise backward pass against autograd through the model in memory."""

import pytest
import torch

from moesvd_quant.calibration.fisher import expert_fisher, fisher_inputs
from moesvd_quant.model.experts import find_experts, split_projections
from moesvd_quant.model.stream import StreamedModel
from tiny import tiny_model

WINDOWS = torch.randint(1, 250, (3, 24), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_it_is_the_mean_of_squared_gradients_per_sequence(architecture, make_model):
    model = tiny_model(architecture)
    expected: dict = {}
    for window in WINDOWS:
        model.zero_grad()
        model(window[None], labels=window[None]).loss.backward()
        for path, experts in find_experts(model):
            first = "gate_up_proj"
            held = getattr(experts, first).data, experts.down_proj.data
            getattr(experts, first).data, experts.down_proj.data = getattr(experts, first).grad, experts.down_proj.grad
            for name, gradient in split_projections(experts).items():
                key = path, name
                expected[key] = expected.get(key, 0) + gradient.detach().square() / len(WINDOWS)
            getattr(experts, first).data, experts.down_proj.data = held
    streamed = StreamedModel(make_model(architecture))
    found = {
        (f"{streamed.layer_names[index]}.{path}", name): fisher
        for index, modules in expert_fisher(streamed, WINDOWS)
        for path, projections in modules.items()
        for name, (_, fisher) in projections.items()
    }
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.allclose(found[key], value, rtol=1e-3, atol=1e-4 * float(value.max())), key
        assert value.max() > 0


def test_of_each_input_it_is_the_sum_over_outputs(make_model):
    streamed = StreamedModel(make_model("mixtral"))
    found = dict(fisher_inputs(streamed, WINDOWS, lambda done, total: None, None))
    for index, modules in expert_fisher(StreamedModel(make_model("mixtral")), WINDOWS):
        for path, projections in modules.items():
            for name, (weights, fisher) in projections.items():
                own = found[f"{streamed.layer_names[index]}.{path}"][name]
                assert own.shape == (len(weights), weights.shape[2])
                assert torch.allclose(own, torch.einsum("eoi->ei", fisher))
