"""Stage `merge`: which experts become one, what that one computes, and what can stand after it."""

import json

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from transformers import AutoModelForCausalLM

import moesvd_quant
from expert_runs import IDS, job, logits, seen_by_experts
from moesvd_quant.calibration.metric import shrink
from moesvd_quant.decompose.merging import shares_of
from moesvd_quant.export.export import export_checkpoint
from moesvd_quant.model.experts import expert_count, find_experts, split_projections
from moesvd_quant.model.remaining import members_of
from moesvd_quant.planning.context import StageError, expert_grams
from moesvd_quant.recipe.recipe import RecipeError
from moesvd_quant.run.plan import plan_stages

MC = "{merge: {method: mc_smoe, ratio: 0.5}}"
REAM = "{merge: {ratio: 0.5}}"


def size(folder):
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def router_logits(model, windows):
    """{path of experts: (tokens, E)} by transformers' own router modules."""
    found, hooks = {}, []
    for path, _ in find_experts(model):
        home = path.rpartition(".")[0]

        def hook(module, inputs, _, path=path):
            found[path] = F.linear(inputs[0].reshape(-1, inputs[0].shape[-1]), module.weight)

        hooks.append(model.get_submodule(home).gate.register_forward_hook(hook))
    with torch.no_grad():
        model(windows)
    for hook in hooks:
        hook.remove()
    return found


def by_hand(weights, groups, shares):
    """Weights (E, out, in) of MC-SMoE, each expert its group's: channels matched one by one by scipy."""
    made = {name: weight.clone() for name, weight in weights.items()}
    for first, *others in groups:
        total = {name: shares[first] * weight[first] for name, weight in weights.items()}
        for other in others:
            gain = sum(weights[name][first] @ weights[name][other].T for name in ("gate", "up"))
            gain = gain + weights["down"][first].T @ weights["down"][other]
            order = linear_sum_assignment(gain.numpy(), maximize=True)[1]
            for name, weight in weights.items():
                total[name] += shares[other] * (weight[other][:, order] if name == "down" else weight[other][order])
        for expert in (first, *others):
            for name in made:
                made[name][expert] = total[name]
    return made


def test_mc_smoe_is_the_published_method(make_model, tmp_path, small):
    folder = make_model("qwen3_moe")
    run = job(folder, tmp_path, small, MC)
    [plan], [made] = plan_stages(run), run.run()
    assert plan["accounting"]["disk_bytes"] == size(made)
    assert plan["accounting"]["expert_ratio"] == pytest.approx(0.5)
    original = moesvd_quant.load(folder)
    seen, asked = seen_by_experts(original, run.windows), router_logits(original, run.windows)
    used = {path: sums[0] / sums[0].sum() for path, sums in seen.items()}
    leaders = {(path, group[0]) for path, decision in plan["decisions"].items() for group in decision["groups"]}
    first = {(path, int(share.argmax())) for path, share in used.items()}
    others = [(path, expert) for path in used for expert in range(6) if (path, expert) not in first]
    others.sort(key=lambda place: -float(used[place[0]][place[1]]))
    assert leaders == first | set(others[: 6 - len(first)])
    for path, decision in plan["decisions"].items():
        for group in decision["groups"]:
            for expert in group[1:]:
                alike = F.cosine_similarity(asked[path].T[:, None], asked[path].T, dim=-1)[expert]
                assert group[0] == max((one[0] for one in decision["groups"]), key=lambda at: float(alike[at]))
            part = used[path][group] / used[path][group].sum()
            assert torch.allclose(torch.tensor(decision["shares"], dtype=torch.float64)[group], part)
        experts = original.get_submodule(path)
        weights = {name: weight.detach().clone() for name, weight in split_projections(experts).items()}
        for name, weight in by_hand(weights, decision["groups"], decision["shares"]).items():
            with torch.no_grad():
                split_projections(experts)[name].copy_(weight)
    # The original's own class, with a copy of the merged expert in each place.
    assert torch.allclose(logits(made), original(IDS).logits, atol=1e-4)
    assert (logits(made) - logits(folder)).abs().max() > 1e-2


def test_weights_of_experts_that_became_one_add_up(make_model, tmp_path, small):
    [made] = job(make_model("mixtral"), tmp_path, small, MC).run()
    model = moesvd_quant.load(made)
    _, experts = next(find_experts(model))
    part = experts.layout["down"][0]
    pair = [e for e, row in zip(part.experts, part.dense) if part.dense.count(row) > 1][:2]
    x = torch.randn(5, 64)
    index, weights = torch.tensor([pair] * 5), torch.rand(5, 2)
    with torch.no_grad():
        both = experts(x, index, weights)
        once = experts(x, index[:, :1], weights.sum(1, keepdim=True))
    assert torch.allclose(both, once, atol=1e-5) and both.abs().max() > 1e-3


def test_ream_leads_by_reap_and_drops_the_rows_of_the_router(make_model, tmp_path, small):
    folder = make_model("qwen3_moe")
    run = job(folder, tmp_path, small, REAM)
    [plan], [made] = plan_stages(run), run.run()
    assert plan["accounting"]["disk_bytes"] == size(made)
    original = moesvd_quant.load(folder)
    tokens, _, _, product = next(iter(seen_by_experts(original, run.windows).values()))
    reap = product / tokens.clamp(min=1)
    path, decision = next(iter(plan["decisions"].items()))
    assert sorted(group[0] for group in decision["groups"]) == sorted(reap.topk(3).indices.tolist())
    top = int(reap.argmax())
    assert sorted(map(len, decision["groups"])) == [1, 1, 4]  # the first takes all the others
    assert len(next(group for group in decision["groups"] if group[0] == top)) == 4
    leader = torch.tensor([next(g[0] for g in decision["groups"] if e in g) for e in range(6)])
    assert torch.allclose(torch.tensor(decision["shares"]).double(), shares_of(leader, reap), rtol=1e-3)
    # Those that were merged with none are the original's, bit for bit, and so are the router's rows.
    first = moesvd_quant.load(made).get_submodule(path)
    alone = next(row for row, group in enumerate(decision["groups"]) if len(group) == 1)
    native = split_projections(original.get_submodule(path))
    assert torch.equal(first.dense("up", alone), native["up"][decision["groups"][alone][0]])
    rows = [group[0] for group in decision["groups"]]
    gates = [m.get_submodule(path.rpartition(".")[0]).gate.weight for m in (original, moesvd_quant.load(made))]
    assert torch.equal(gates[0][rows], gates[1])
    export_checkpoint(made, tmp_path / "plain", "dense")  # opens without our package
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    assert plain.config.num_experts == 3
    with torch.no_grad():
        assert torch.allclose(plain(IDS).logits, logits(made), atol=1e-5)


@pytest.mark.parametrize("stage", [MC, REAM])
def test_merged_experts_are_quantized_once(stage, make_model, tmp_path, small):
    run = job(make_model("qwen3_moe"), tmp_path, small, f"{stage}, {{gptq: {{bits: 8}}}}")
    plans = plan_stages(run)
    merged, made = run.run()
    assert plans[1]["accounting"]["disk_bytes"] == size(made)
    assert plans[1]["accounting"]["expert_params"] == plans[0]["accounting"]["expert_params"]
    near, far = logits(made), logits(merged)
    assert (near - far).abs().median() < 0.05 * far.std()


def test_ream_and_then_a_budget_over_rank_and_bits(make_model, tmp_path, small):
    stages = f"{REAM}, {{svd: {{}}}}, {{gptq: {{attention: false}}}}"
    run = job(make_model("qwen3_moe"), tmp_path, small, stages, ["budget=17bpw"])
    merged, _, made = run.run()  # bytes for all that is left: nothing is lost
    assert torch.allclose(logits(made), logits(merged), atol=1e-5)


def test_what_cannot_be_merged_is_refused_before_any_work(make_model, tmp_path, small):
    mixtral = make_model("mixtral")
    with pytest.raises(StageError, match=r"mlp.experts: experts with biases cannot be merged; use prune"):
        plan_stages(job(make_model("gpt_oss"), tmp_path, small, REAM))
    with pytest.raises(StageError, match=r"merge leaves 1 of 4 experts: a token is sent to 2.*lower the ratio"):
        plan_stages(job(mixtral, tmp_path, small, "{merge: {ratio: 0.75}}"))
    with pytest.raises(StageError, match=r"merge.group_size 2: 2 groups of at most 2 .* cannot hold 6; raise it"):
        plan_stages(job(make_model("qwen3_moe"), tmp_path, small, "{merge: {ratio: 0.67, group_size: 2}}"))
    with pytest.raises(StageError, match=r"merge.ratio 0.9: 1 experts are to be kept, and layers need 2 at least"):
        plan_stages(job(mixtral, tmp_path, small, "{merge: {method: mc_smoe, ratio: 0.9}}"))
    for stages, said in (
        ("{merge: {ratio: 1.5}}", "1.5 is not between 0 and 1"),
        ("{merge: {method: mc_smoe, ratio: 0.5, group_size: 4}}", "group_size: only with method: ream"),
        ("{prune: {ratio: 0.5}}, {merge: {ratio: 0.3}}", "merge"),
    ):
        with pytest.raises(RecipeError, match=said):
            job(mixtral, tmp_path, small, stages)
    merged = make_model("qwen3_moe")
    for stages, said in (
        (f"{REAM}, {{gptq: {{bits: 4, error_aware: true}}}}", "merged of several: .*; leave out error_aware"),
        (f"{MC}, {{svd: {{ratio: 0.3}}}}", "is merged on shared matrices already; ranks and widths are chosen of an"),
        (f"{MC}, {{svd: {{method: svd_llm, ratio: 0.3}}}}", "some experts were left out or merged; svd.method svd_llm"),
    ):
        with pytest.raises(StageError, match=said):
            plan_stages(job(merged, tmp_path, small, stages))


@pytest.mark.parametrize("stage", [MC, REAM])
def test_channels_of_merged_experts_are_judged_in_their_leaders_order(stage, make_model, tmp_path, small):
    """Down's inputs of others stand in another order: the statistics of the leader alone tell of them."""
    run = job(make_model("mixtral"), tmp_path, small, stage)
    [made] = run.run()
    path, experts = next(find_experts(moesvd_quant.load(made)))
    groups = json.loads((made / "moesvd.json").read_text())["decisions"][path]["groups"]
    statistics = next(run.statistics.layers())
    own = path.removeprefix("model.layers.0.")
    grams = expert_grams(statistics, own, "cpu", shrink, members_of(experts))
    for expert in range(expert_count(experts)):
        group = members_of(experts)[expert]
        assert group in groups
        for name, seen, whose in (("up", "gram_in", group), ("down", "gram_mid", group[:1])):
            every = statistics[f"{own}/{seen}"]
            pooled = every.sum(0) / statistics[f"{own}/tokens"].sum()
            assert torch.allclose(grams[name][expert], every[whose].sum(0) + pooled * len(pooled), rtol=1e-4)
