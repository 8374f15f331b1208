"""MoE-I²: what a layer loses without each of its experts, by transformers' own formulas, and the ranks that follow."""

import numpy as np
import pytest
import torch

import moesvd_quant
from expert_runs import job, logits
from moesvd_quant.planning.context import StageError
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.run.plan import plan_stages
from stages.test_naee import without

STAGES = "{prune: {ratio: 0.25, by: reconstruction}}, {svd: {method: plain, ranks: importance, ratio: 0.4, power: 1.0}}"


@torch.no_grad()
def test_experts_get_ranks_by_what_their_layer_loses_without_them(make_model, tmp_path, small):
    folder = make_model("mixtral")
    run = job(folder, tmp_path, small, STAGES)
    pruned, planned = plan_stages(run)
    made = run.run()[-1]
    original, seen, result = moesvd_quant.load(folder), [], moesvd_quant.load(made)
    for layer in original.model.layers:
        layer.mlp.register_forward_pre_hook(lambda block, x: seen.append((block, x[0].clone())))
    original(run.windows)
    for (block, x), path in zip(seen, planned["decisions"], strict=True):
        left = [e for e in range(4) if e not in pruned["decisions"][path]["left out"]]
        flat, whole = x.flatten(0, 1), without(block, x.flatten(0, 1), range(4))
        loss = lambda kept: float((whole - without(block, flat, kept)).view(x.shape).flatten(1).norm(dim=1).sum())  # noqa: B023, E731
        lost = np.array([loss([e for e in left if e != out]) for out in left]) - loss(left)
        ranks = planned["decisions"][path]["ranks"]
        share = np.maximum(lost, 0) / np.maximum(lost, 0).sum()
        for own in ranks.values():
            assert np.abs(np.array(own) - share * sum(own)).max() < 8  # ranks are in steps of 8
        # The factors are the plain singular value decomposition of the experts that are left, as numpy has it.
        experts = result.get_submodule(path)
        for name, weights in (("up", block.experts.gate_up_proj.chunk(2, 1)[1]), ("down", block.experts.down_proj)):
            for at, expert in enumerate(left):
                u, s, v = np.linalg.svd(weights[expert].double().numpy(), full_matrices=False)
                expected = (u[:, : ranks[name][at]] * s[: ranks[name][at]]) @ v[: ranks[name][at]]
                assert np.abs(experts.dense(name, at).numpy() - expected).max() < 1e-4
    before = sum(3 * 96 * 64 for _ in range(2 * 3))
    kept = sum(
        r * sum({"gate": (96, 64), "up": (96, 64), "down": (64, 96)}[name])
        for one in planned["decisions"].values()
        for name, own in one["ranks"].items()
        for r in own
    )
    assert kept <= 0.6 * before < kept + 2 * 3 * 160 * 8
    assert planned["accounting"]["disk_bytes"] == sum(file.stat().st_size for file in made.glob("*.safetensors"))
    assert torch.isfinite(logits(made)).all()


def test_an_original_has_ranks_by_importance_too(make_model, tmp_path, small):
    stage = "{svd: {method: svd_llm, ranks: importance, ratio: 0.4}}"
    [planned] = plan_stages(job(make_model("qwen2_moe"), tmp_path, small, stage))
    assert all(len(set(one["ranks"]["down"])) > 1 for one in planned["decisions"].values())


def test_experts_that_cannot_be_left_out_are_refused(make_model, tmp_path, small):
    stages = STAGES.replace("0.25", "0.5")  # two are left, and a token is sent to two
    with pytest.raises(StageError, match="without any one of its experts"):
        plan_stages(job(make_model("mixtral"), tmp_path, small, stages))


def test_the_recipe_is_the_papers_three_steps():
    assert [stage.name for stage in load_recipe("moe-i2").stages] == ["prune", "svd", "lora"]
