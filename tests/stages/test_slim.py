"""Stage `slim`: what is left of the channels, that it is what the numbers say, and what can stand beside it."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import moesvd_quant
from expert_runs import IDS, job, logits
from moesvd_quant.export.export import export_checkpoint
from moesvd_quant.planning.context import StageError
from moesvd_quant.run.plan import plan_stages

HALF = "{slim: {ratio: 0.5}}"


@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe"])
@torch.no_grad()
def test_a_slim_model_is_smaller_and_what_its_weights_say(architecture, make_model, tmp_path, small):
    folder = make_model(architecture)
    run = job(folder, tmp_path, small, HALF)
    [plan], [made] = plan_stages(run), run.run()
    account = plan["accounting"]
    assert account["disk_bytes"] == sum(file.stat().st_size for file in made.glob("*.safetensors"))
    assert account["expert_ratio"] == pytest.approx(0.5, abs=0.01)
    result, original = moesvd_quant.load(made), moesvd_quant.load(folder)
    # The original with the experts' weights written out, the channels that went being zeros, gives the same.
    for path in plan["decisions"]:
        experts, native = result.get_submodule(path), original.get_submodule(path)
        for expert in range(experts.experts):
            for at, name in enumerate(("gate", "up")):
                native.gate_up_proj[expert].chunk(2)[at].copy_(experts.dense(name, expert))
            native.down_proj[expert].copy_(experts.dense("down", expert))
    assert torch.allclose(logits(made), original(IDS).logits, atol=1e-5)
    export_checkpoint(made, tmp_path / "dense", "dense")
    assert torch.allclose(logits(tmp_path / "dense"), original(IDS).logits, atol=1e-5)


@torch.no_grad()
def test_channels_are_the_originals_and_down_is_fitted_to_them(make_model, tmp_path, small):
    """Each expert's gate and up are rows of the original's, and down loses less than the same columns as they were."""
    folder = make_model("mixtral")
    [made] = job(folder, tmp_path, small, HALF).run()
    result, original = moesvd_quant.load(made), moesvd_quant.load(folder)
    for mine, layer in zip(result.model.layers, original.model.layers):
        for expert in range(4):
            gate, up = (part.numpy() for part in layer.mlp.experts.gate_up_proj[expert].chunk(2))
            small_gate, small_up = (mine.mlp.experts.dense(name, expert)[:48].numpy() for name in ("gate", "up"))
            distance = np.abs(small_gate[:, None] - gate[None]).max(-1)
            kept = distance.argmin(1)
            assert distance.min(1).max() == 0 and (np.diff(kept) > 0).all() and np.array_equal(small_up, up[kept])
            assert not mine.mlp.experts.dense("gate", expert)[48:].any()
    full, seen = moesvd_quant.load(folder), []
    run = job(folder, tmp_path, small, HALF)
    full.model.layers[0].mlp.experts.register_forward_pre_hook(lambda _, args: seen.append(args))
    full(run.windows)
    x, chosen, _ = seen[0]
    own, before = result.model.layers[0].mlp.experts, original.model.layers[0].mlp.experts
    for expert in range(4):
        tokens = x[(chosen == expert).any(-1)]
        gate, up = F.linear(tokens, before.gate_up_proj[expert]).chunk(2, -1)
        wanted = F.linear(F.silu(gate) * up, before.down_proj[expert])
        inner = F.silu(F.linear(tokens, own.dense("gate", expert))) * F.linear(tokens, own.dense("up", expert))
        rows = (own.dense("gate", expert)[:48, None] - before.gate_up_proj[expert][:96]).abs().amax(-1).argmin(1)
        plain = F.linear(inner[:, :48], before.down_proj[expert][:, rows])
        assert (F.linear(inner, own.dense("down", expert)) - wanted).norm() < 0.95 * (plain - wanted).norm()


def test_it_goes_after_pruning_and_before_quantization(make_model, tmp_path, small):
    stages = "{prune: {ratio: 0.25}}, {slim: {ratio: 0.5}}, {gptq: {bits: 4}}"
    run = job(make_model("mixtral"), tmp_path, small, stages)
    *_, made = run.run()
    account = run.forecasts[-1]["accounting"]
    assert account["disk_bytes"] == sum(file.stat().st_size for file in made.glob("*.safetensors"))
    assert account["expert_ratio"] == pytest.approx(1 - 0.75 * 0.5, abs=0.01)
    assert torch.isfinite(logits(made)).all()


@pytest.mark.parametrize("train", ["adapters", "factors"])
def test_what_is_left_is_healed_in_the_bytes_it_has(train, make_model, tmp_path, small):
    options = (
        "steps: 6, batch: 4, microbatch: 2, rank: 8, lr: 0.003, validation: 4, validate_every: 3, attention: false"
    )
    run = job(make_model("mixtral"), tmp_path, small, f"{HALF}, {{lora: {{train: {train}, {options}}}}}")
    slim, healed = run.run()
    outcome = json.loads((healed / "moesvd.json").read_text())["notes"]["healing"]
    assert outcome["healed"] and outcome["validation_perplexity_after"] < outcome["validation_perplexity_before"]
    before, after = moesvd_quant.load(slim), moesvd_quant.load(healed)
    for one, two in zip(before.model.layers, after.model.layers):
        one, two = one.mlp.experts, two.mlp.experts
        assert one.layout == two.layout and torch.equal(one.channels, two.channels)
        for expert in range(4):  # channels that went stay away, and all the rest moved
            for name, gone in (("gate", np.s_[48:]), ("up", np.s_[48:]), ("down", np.s_[:, 48:])):
                assert not two.dense(name, expert)[gone].any()
            assert not torch.equal(one.dense("up", expert), two.dense("up", expert))
    sizes = [sum(file.stat().st_size for file in made.glob("*.safetensors")) for made in (slim, healed)]
    assert sizes[0] == sizes[1]


def test_what_cannot_lose_channels_is_refused(make_model, tmp_path, small):
    with pytest.raises(StageError, match="experts with biases cannot lose channels"):
        plan_stages(job(make_model("gpt_oss"), tmp_path, small, HALF))
    with pytest.raises(StageError, match="slim takes whole ones"):
        plan_stages(job(make_model("mixtral"), tmp_path, small, "{merge: {method: mc_smoe, ratio: 0.5}}, " + HALF))
