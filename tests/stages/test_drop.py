"""Stage `drop`: which MoE layers go, that nothing of them is left, and what can stand after it."""

import pytest
import torch
import torch.nn.functional as F

import moesvd_quant
from expert_runs import IDS, job, logits
from moesvd_quant.planning.context import StageError
from moesvd_quant.run.plan import plan_stages

ONE = "{drop: {layers: 1}}"


def states(model, windows):
    """(hidden states before the norm of the MLP, after the layer), (tokens, H) each, of each layer of a Mixtral-like
    model, by transformers' own modules."""
    seen, hooks = [[None, None] for _ in model.model.layers], []
    for at, layer in enumerate(model.model.layers):
        norm = layer.post_attention_layernorm
        hooks.append(norm.register_forward_pre_hook(lambda _, x, at=at: seen[at].__setitem__(0, x[0].flatten(0, 1))))
        hooks.append(layer.register_forward_hook(lambda _, x, y, at=at: seen[at].__setitem__(1, y.flatten(0, 1))))
    with torch.no_grad():
        model(windows)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe"])
def test_the_layer_goes_that_changes_its_states_least(architecture, make_model, tmp_path, small):
    folder = make_model(architecture)
    run = job(folder, tmp_path, small, ONE)
    [plan], [made] = plan_stages(run), run.run()
    assert plan["accounting"]["disk_bytes"] == sum(file.stat().st_size for file in made.glob("*.safetensors"))
    original = moesvd_quant.load(folder)
    expected = [float(F.cosine_similarity(*pair, dim=-1).mean()) for pair in states(original, run.windows)]
    found = [entry["similarity"] for entry in plan["decisions"].values()]
    assert found == pytest.approx(expected, abs=1e-4)
    gone = max(range(2), key=lambda at: expected[at])
    assert [entry["dropped"] for entry in plan["decisions"].values()] == [at == gone for at in range(2)]
    # The original with an MLP of zeros, shared experts included.
    original.model.layers[gone].mlp.forward = torch.zeros_like
    with torch.no_grad():
        assert torch.allclose(logits(made), original(IDS).logits, atol=1e-5)
    assert not [name for name in moesvd_quant.load(made).state_dict() if f"layers.{gone}.mlp.experts" in name]
    assert plan["accounting"]["expert_ratio"] == pytest.approx(0.5)


def test_what_is_left_is_factorized_and_quantized(make_model, tmp_path, small):
    stages = f"{ONE}, {{svd: {{}}}}, {{gptq: {{error_aware: true}}}}"
    run = job(make_model("qwen2_moe"), tmp_path, small, stages, ["budget=2bpw"])
    *_, made = run.run()
    account = run.forecasts[-1]["accounting"]
    assert account["disk_bytes"] == sum(file.stat().st_size for file in made.glob("*.safetensors"))
    assert account["expert_bytes"] * 8 <= 2 * account["original_expert_params"]
    assert torch.isfinite(logits(made)).all()


def test_what_cannot_be_dropped_is_refused(make_model, tmp_path, small):
    with pytest.raises(StageError, match=r"drop.layers 2: the model has 2 MoE layers, and one has to stay"):
        plan_stages(job(make_model("mixtral"), tmp_path, small, "{drop: {layers: 2}}"))
    with pytest.raises(StageError, match="experts with biases give something without weights: cannot be dropped"):
        plan_stages(job(make_model("gpt_oss"), tmp_path, small, ONE))
