"""Stressed models are what they say, and what `fit` loses is judged by the best of the others."""

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralForCausalLM

from moesvd_quant.evaluation.benchmarks.stress import RUNS, quotient
from moesvd_quant.evaluation.benchmarks.stressed import HOT, STRESSES, write_stressed
from moesvd_quant.model.named import resolve_model

SOURCE = resolve_model("reference")


@pytest.fixture(scope="module")
def ids():
    return torch.randint(5, 4000, (4, 64), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def original():
    return MixtralForCausalLM.from_pretrained(SOURCE, dtype=torch.float32).eval()


@pytest.fixture
def stressed(ids, tmp_path):
    def make(stress):
        write_stressed(SOURCE, stress, tmp_path / stress, ids)
        return AutoModelForCausalLM.from_pretrained(tmp_path / stress, dtype=torch.float32).eval()

    return make


def loads(model, ids) -> torch.Tensor:
    """(layers, experts): share of the tokens that each expert gets."""
    routers, found = [layer.mlp.gate for layer in model.model.layers], []
    hooks = [router.register_forward_hook(lambda *given: found.append(given[2][2])) for router in routers]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return (
        torch.stack([index.flatten().bincount(minlength=len(r.weight)) for index, r in zip(found, routers)])
        / ids.numel()
    )


@pytest.mark.parametrize("stress", ["hidden-outliers", "inner-outliers", "128-experts"])
@torch.no_grad()
def test_what_is_moved_between_weights_changes_nothing(stress, stressed, original, ids):
    model, expected = stressed(stress), original(ids).logits
    assert (model(ids).logits - expected).norm() < 1e-3 * expected.norm()
    changed = dict(model.named_parameters())
    assert any(
        changed[name].shape != old.shape or not torch.equal(changed[name], old)
        for name, old in original.named_parameters()
    )


def test_outliers_are_many_times_the_other_channels(stressed, original):
    norms = [model.model.layers[0].post_attention_layernorm.weight for model in (stressed("hidden-outliers"), original)]
    assert torch.equal(norms[0][:4], 32 * norms[1][:4]) and torch.equal(norms[0][4:], norms[1][4:])


def test_cold_and_hot_experts_have_the_tokens_they_should(stressed, original, ids):
    before = loads(original, ids)
    assert loads(stressed("cold-experts"), ids)[:, :2].max() < 0.1 < before.mean()
    hot = loads(stressed("hot-expert"), ids)[:, 0]
    assert hot.min() > HOT - 0.1 and (hot > before[:, 0]).all()


@torch.no_grad()
def test_other_stresses_are_of_their_kind(stressed, original, ids):
    assert torch.allclose(loads(stressed("top-1"), ids).sum(1), torch.ones(4))
    untied = stressed("untied")
    assert torch.allclose(untied(ids).logits[..., 1::2], original(ids).logits[..., 1::2], atol=1e-3)
    assert torch.allclose(untied(ids).logits[..., ::2], 2 * original(ids).logits[..., ::2], atol=1e-3)
    block, seen = stressed("shared-expert").model.layers[0].mlp, torch.randn(16, original.config.hidden_size)
    whole, shared = block(seen[None])[0], block.shared_expert(seen) / 2
    assert shared.norm() > 1.5 * (whole - shared).norm()


def test_each_size_judges_fit_and_the_best_of_the_others_decides():
    assert all(next(iter(runs)) == "fit" and len(runs) > 2 for runs in RUNS.values())
    assert quotient({"fit": 0.3, "a": 0.5, "b": 0.2}) == ("b", pytest.approx(1.5))
    assert set(STRESSES) >= {
        "hidden-outliers",
        "cold-experts",
        "hot-expert",
        "top-1",
        "128-experts",
        "shared-expert",
        "untied",
    }
