"""Stage `prune`: what experts are worth, which of them stay, and what can stand after it."""

from itertools import combinations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import moesvd_quant
from expert_runs import IDS, job, logits, seen_by_experts
from moesvd_quant.decompose.saliency import keep_in_layer, keep_in_model, saliency
from moesvd_quant.export.export import export_checkpoint
from moesvd_quant.planning.context import StageError
from moesvd_quant.recipe.recipe import RecipeError
from moesvd_quant.run.output import RunError
from moesvd_quant.run.plan import plan_stages


@pytest.mark.parametrize("by", ["reap", "frequency", "weight", "norm"])
def test_scores_are_the_published_formulas(by, make_model, tmp_path, small):
    folder = make_model("qwen3_moe")
    run = job(folder, tmp_path, small, f"{{prune: {{ratio: 0.5, by: {by}}}}}")
    decisions = plan_stages(run)[0]["decisions"]
    seen = seen_by_experts(moesvd_quant.load(folder), run.windows)
    assert decisions.keys() == seen.keys()
    for path, (tokens, weight, norm, product) in seen.items():
        expected = {"reap": product / tokens.clamp(min=1), "frequency": tokens, "weight": weight, "norm": norm}[by]
        scores = torch.tensor(decisions[path]["scores"], dtype=torch.float64)
        assert torch.allclose(scores, expected, rtol=1e-4)
        gone = decisions[path]["left out"]
        assert expected[gone].max() <= expected[sorted(set(range(6)) - set(gone))].min()


def test_an_expert_without_tokens_is_worth_nothing_and_an_unknown_criterion_is_refused():
    zero = torch.zeros(2)
    assert saliency("reap", torch.tensor([0, 2]), zero, zero, torch.tensor([0.0, 3.0])).tolist() == [0, 1.5]
    with pytest.raises(ValueError, match="'luck' is none of reap"):
        saliency("luck", zero, zero, zero, zero)


def test_of_a_layer_the_best_subset_is_kept():
    scores = torch.rand(6, generator=torch.Generator().manual_seed(1))
    best = max(combinations(range(6), 4), key=lambda chosen: float(scores[list(chosen)].sum()))
    assert keep_in_layer(scores, 4, 1, ()) == list(best)
    worst = int(scores.argmin())
    with_worst = [chosen for chosen in combinations(range(6), 4) if worst in chosen]
    assert keep_in_layer(scores, 4, 1, {worst}) == list(max(with_worst, key=lambda c: float(scores[list(c)].sum())))
    each = keep_in_layer(scores, 4, 2, ())
    assert sum(expert < 3 for expert in each) == 2
    assert keep_in_layer(torch.ones(4), 2, 1, ()) == [0, 1]  # of equal ones the first
    with pytest.raises(ValueError, match="2 experts are protected and 1 are to be kept"):
        keep_in_layer(scores, 1, 1, {0, 1})
    with pytest.raises(ValueError, match="3 experts cannot be spread over 2 groups"):
        keep_in_layer(scores, 3, 2, ())


def test_of_a_model_the_best_shares_are_kept():
    scores = [torch.tensor([6.0, 3.0, 1.0]), torch.tensor([500.0, 490.0, 10.0])]
    assert keep_in_model(scores, 4, [1, 1], [(), ()]) == [[0, 1], [0, 1]]
    assert keep_in_model(scores, 3, [1, 1], [(), ()]) == [[0], [0, 1]]
    assert keep_in_model(scores, 3, [1, 1], [(), {2}]) == [[0], [0, 2]]
    with pytest.raises(ValueError, match="3 experts are to be kept, and layers need 4 at least"):
        keep_in_model(scores, 3, [2, 2], [(), ()])


def test_a_protected_expert_stays_and_one_that_is_not_there_is_named(make_model, tmp_path, small):
    folder = make_model("mixtral")
    free = plan_stages(job(folder, tmp_path, small, "{prune: {ratio: 0.5}}"))[0]
    path, decision = next(iter(free["decisions"].items()))
    gone = decision["left out"][0]
    kept = plan_stages(job(folder, tmp_path, small, f"{{prune: {{ratio: 0.5, protect: ['0.{gone}']}}}}"))[0]
    assert [gone] in kept["layout"]["sources"][path] and [gone] not in free["layout"]["sources"][path]
    with pytest.raises(StageError, match=r"prune.protect: 0.77: the model has no such layer or expert"):
        plan_stages(job(folder, tmp_path, small, "{prune: {ratio: 0.5, protect: ['0.77']}}"))


def test_what_cannot_be_pruned_is_refused(make_model, tmp_path, small):
    mixtral, grouped = make_model("mixtral"), make_model("deepseek_v3")
    with pytest.raises(StageError, match=r"mlp.experts: prune leaves 1 of 4 experts: a token is sent to 2.*lower the"):
        plan_stages(job(mixtral, tmp_path, small, "{prune: {ratio: 0.75}}"))
    with pytest.raises(StageError, match="chooses among groups of one size; prune with scope: layer"):
        plan_stages(job(grouped, tmp_path, small, "{prune: {ratio: 0.3, scope: model}}"))
    for stages, said in (
        ("{prune: {ratio: 1.5}}", "1.5 is not between 0 and 1"),
        ("{prune: {ratio: 0.5, protect: ['a.1']}}", "protect"),
        ("{prune: {ratio: 0.5}}, {d2: {ratio: 0.3}}", "d2"),
    ):
        with pytest.raises(RecipeError, match=said):
            job(mixtral, tmp_path, small, stages)


def test_over_the_model_counts_differ_and_add_up(make_model, tmp_path, small):
    folder = make_model("qwen3_moe")
    run = job(folder, tmp_path, small, "{prune: {ratio: 0.4, scope: model}}")
    planned = plan_stages(run)[0]
    counts = [len(sources) for sources in planned["layout"]["sources"].values()]
    assert sum(counts) == round(0.6 * 6 * len(counts))
    [made] = run.run()
    assert planned["accounting"]["disk_bytes"] == sum(f.stat().st_size for f in made.glob("*.safetensors"))
    assert torch.isfinite(logits(made)).all()


def test_a_pruned_model_opens_without_us(make_model, tmp_path, small):
    [made] = job(make_model("qwen2_moe"), tmp_path, small, "{prune: {ratio: 0.25}}").run()
    export_checkpoint(made, tmp_path / "plain", "dense")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    assert plain.config.num_experts == 4 and not type(plain).__module__.startswith("moesvd")
    with torch.no_grad():
        assert torch.allclose(plain(IDS).logits, logits(made), atol=1e-5)


def test_with_bytes_for_all_that_is_left_the_budget_loses_nothing(make_model, tmp_path, small):
    stages = "{prune: {ratio: 0.5}}, {svd: {}}, {gptq: {attention: false}}"
    run = job(make_model("qwen3_moe"), tmp_path, small, stages, ["budget=17bpw"])
    pruned, _, made = run.run()
    assert torch.allclose(logits(made), logits(pruned), atol=1e-5)


def test_a_budget_after_pruning_is_met_and_resumes_to_the_same_bits(make_model, tmp_path, small):
    stages = "{prune: {ratio: 0.5}}, {svd: {}}, {gptq: {error_aware: true}}"
    folder = make_model("mixtral")
    run = job(folder, tmp_path, small, stages, ["budget=2.5bpw"])
    _, between, made = run.run()
    account = run.forecasts[-1]["accounting"]
    assert account["disk_bytes"] == sum(f.stat().st_size for f in made.glob("*.safetensors"))
    assert account["expert_bytes"] * 8 <= 2.5 * account["original_expert_params"]
    files = {f.name: load_file(f) for f in made.glob("*.safetensors")}
    for old in (between, made):
        old.rename(tmp_path / old.name)
    *_, again = job(folder, tmp_path, small, stages, ["budget=2.5bpw"]).run()
    for name, tensors in files.items():
        found = load_file(again / name)
        assert tensors.keys() == found.keys() and all(torch.equal(found[key], tensors[key]) for key in found)
    with pytest.raises(RunError, match="has lost some of the original's experts; run all stages in one recipe"):
        job(made, tmp_path, small, "{gptq: {bits: 4}}")


def test_published_factorizations_take_all_experts(make_model, tmp_path, small):
    stages = "{prune: {ratio: 0.5}}, {svd: {method: asvd, ratio: 0.3}}"
    with pytest.raises(StageError, match=r"experts were left out or merged; svd\.method asvd takes all"):
        plan_stages(job(make_model("mixtral"), tmp_path, small, stages))
