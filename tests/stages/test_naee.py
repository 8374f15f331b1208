"""`prune.by: reconstruction`: the subset of experts whose layer's output differs least, by transformers' own blocks."""

from itertools import combinations

import pytest
import torch
import torch.nn.functional as F

import moesvd_quant
from expert_runs import IDS, job, logits
from moesvd_quant.calibration.reconstruction import BlockWatch
from moesvd_quant.decompose import subsets
from moesvd_quant.decompose.subsets import best_subset
from moesvd_quant.planning.context import StageError
from moesvd_quant.recipe.recipe import RecipeError
from moesvd_quant.run.plan import plan_stages

NAEE = "{prune: {ratio: 0.5, by: reconstruction}}"


def without(block, x, kept):
    """Output (tokens, H) of a Mixtral block whose other experts' logits are minus infinity, by the formulas."""
    scores = F.linear(x, block.gate.weight)
    scores[:, [expert for expert in range(scores.shape[1]) if expert not in kept]] = -torch.inf
    weight, chosen = scores.softmax(-1).topk(2)
    weight, total = weight / weight.sum(-1, keepdim=True), torch.zeros_like(x)
    for expert in kept:
        gate, up = F.linear(x, block.experts.gate_up_proj[expert]).chunk(2, -1)
        out = F.linear(F.silu(gate) * up, block.experts.down_proj[expert])
        total += out * (weight * (chosen == expert)).sum(-1, keepdim=True)
    return total


@torch.no_grad()
def test_the_subset_of_the_least_loss_stays(make_model, tmp_path, small):
    folder = make_model("mixtral")
    run = job(folder, tmp_path, small, NAEE)
    [plan], [made] = plan_stages(run), run.run()
    original, seen = moesvd_quant.load(folder), []
    for layer in original.model.layers:
        layer.mlp.register_forward_pre_hook(lambda block, x: seen.append((block, x[0].clone())))
    original(run.windows)
    for (block, x), decision in zip(seen, plan["decisions"].values()):
        losses = {}
        for kept in combinations(range(4), 2):
            whole, part = without(block, x.flatten(0, 1), range(4)), without(block, x.flatten(0, 1), kept)
            losses[kept] = float((whole - part).view(x.shape).flatten(1).norm(dim=1).sum())
        best = min(losses, key=losses.get)
        assert decision["left out"] == [expert for expert in range(4) if expert not in best]
        assert decision["loss"] == pytest.approx(losses[best], rel=1e-3)
    assert torch.isfinite(logits(made)).all() and (logits(made) - logits(folder)).abs().max() > 1e-2


@pytest.mark.parametrize("architecture", ["qwen2_moe", "deepseek_v2", "gpt_oss"])
@torch.no_grad()
def test_the_loss_is_what_the_pruned_block_loses(architecture, make_model):
    model = moesvd_quant.load(make_model(architecture))
    block = model.model.layers[-1].mlp
    watch = BlockWatch(block, "experts", 1)
    hidden = []
    hook = block.register_forward_pre_hook(lambda _, x: hidden.append(x[0].clone()))
    model(IDS)
    hook.remove()
    watch.detach()
    every = list(range(block.experts.num_experts))
    assert watch.loss(every) == pytest.approx(0, abs=1e-3)
    before = block(hidden[0])
    kept = every[::2]
    loss = watch.loss(kept)
    router = block.get_submodule("router" if architecture == "gpt_oss" else "gate")
    assert len(router.weight) == len(every)  # the model's own router is as it was
    after = _pruned(block, router, kept)(hidden[0])
    first = lambda output: output[0] if isinstance(output, tuple) else output  # noqa: E731
    assert loss == pytest.approx(float((first(before) - first(after)).flatten(1).norm(dim=1).sum()), rel=1e-3)


def _pruned(block, router, kept):
    """The block after its experts and their rows of the router were cut in place."""
    for module in (router, block.experts):
        for name, tensor in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(tensor[kept]))
    for module in (router, block.experts, block):
        for name in ("num_experts", "n_routed_experts", "num_local_experts"):
            if hasattr(module, name):
                setattr(module, name, len(kept))
    return block


def test_many_subsets_are_searched_by_going_back(monkeypatch):
    worth = torch.rand(7, generator=torch.Generator().manual_seed(2))
    alone = lambda kept: -float(worth[kept].sum())  # noqa: E731
    exact = best_subset(7, 3, {0}, alone)
    monkeypatch.setattr(subsets, "EXHAUSTIVE", 1)
    assert best_subset(7, 3, {0}, alone) == exact  # what experts are worth adds up: no way is better
    assert 0 in exact and len(exact) == 3


def test_what_cannot_be_compared_is_refused(make_model, tmp_path, small):
    with pytest.raises(StageError, match="chooses among groups of one size; prune by: reap"):
        plan_stages(job(make_model("deepseek_v3"), tmp_path, small, "{prune: {ratio: 0.3, by: reconstruction}}"))
    with pytest.raises(StageError, match=r"prune leaves 1 of 4 experts: a token is sent to 2.*lower the ratio"):
        plan_stages(job(make_model("mixtral"), tmp_path, small, "{prune: {ratio: 0.75, by: reconstruction}}"))
    crowded = "{prune: {ratio: 0.5, by: reconstruction, protect: ['0.0', '0.1', '0.2']}}"
    with pytest.raises(StageError, match="3 experts are protected and 2 are to be kept"):
        plan_stages(job(make_model("mixtral"), tmp_path, small, crowded))
    with pytest.raises(RecipeError, match="scope: only with by other than reconstruction"):
        job(make_model("mixtral"), tmp_path, small, "{prune: {ratio: 0.5, by: reconstruction, scope: model}}")
