"""Effects of rounding, measured in one walk, against the model in memory with one group rounded."""

import pytest
import torch

from moesvd_quant.calibration.effect import LENGTH, TOKENS, measure_effects, perturbed
from moesvd_quant.model.experts import find_experts, split_projections
from moesvd_quant.model.stream import StreamedModel
from tiny import tiny_model

WINDOWS = torch.randint(1, 250, (6, 32), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss", "deepseek_v2"])
@torch.no_grad()
def test_it_is_the_divergence_of_a_model_with_that_group_rounded(architecture, make_model):
    found = measure_effects(StreamedModel(make_model(architecture)), WINDOWS, 4)
    model = tiny_model(architecture)
    original = model(WINDOWS).logits.log_softmax(-1)
    groups = [(path, name) for path, experts in find_experts(model) for name in split_projections(experts)]
    assert set(found) == set(groups)
    for path, name in groups:
        weights = split_projections(model.get_submodule(path))[name]
        kept = weights.clone()
        weights.copy_(perturbed(weights))
        expected = torch.nn.functional.kl_div(
            model(WINDOWS).logits.log_softmax(-1), original, log_target=True, reduction="sum"
        )
        weights.copy_(kept)
        assert found[path, name] == pytest.approx(float(expected) / WINDOWS.numel(), rel=1e-3, abs=1e-7)
        assert found[path, name] > 1e-5


def test_the_walk_itself_is_not_changed(make_model):
    streamed = StreamedModel(make_model("mixtral"))
    measure_effects(streamed, WINDOWS, 4)
    after = torch.cat(list(streamed.hidden))
    plain = StreamedModel(make_model("mixtral"))
    list(plain.walk(WINDOWS, 4))
    assert torch.equal(after, torch.cat(list(plain.hidden)))


def test_only_as_much_text_as_is_needed_is_used(make_model, monkeypatch):
    seen = []
    walk = StreamedModel.walk
    monkeypatch.setattr(
        StreamedModel, "walk", lambda self, windows, *rest: seen.append(windows.shape) or walk(self, windows, *rest)
    )
    measure_effects(StreamedModel(make_model("mixtral")), WINDOWS.repeat(300, 1))
    assert seen == [(TOKENS // 32, 32)] and LENGTH == 256
