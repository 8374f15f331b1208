"""Stage `svd`: FWSVD, and the ranks of OWL and of ASVD's search, against their formulas."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import moesvd_quant
from moesvd_quant.decompose.truncation import RATIOS, rank_of
from moesvd_quant.model.experts import dense_weight, find_experts, split_projections
from moesvd_quant.planning.context import StageError
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.recipe.recipe import RecipeError
from moesvd_quant.run.plan import plan_stages
from moesvd_quant.run.run import Run


def job(folder, out, small, options):
    (out / "mine.yaml").write_text(f"stages: [{{svd: {{{options}}}}}]")
    return Run(load_recipe(out / "mine.yaml", [*small, "evaluate.perplexity=[]"]), folder, out / "out")


def squared_gradients(model, windows):
    """{path: {projection: mean over windows of the squared gradient (E, out, in)}} by autograd through the model."""
    found: dict = {}
    for window in windows:
        model.zero_grad()
        model(window[None], labels=window[None]).loss.backward()
        for path, experts in find_experts(model):
            gate, up = experts.gate_up_proj.grad.chunk(2, dim=1)
            for name, grad in {"gate": gate, "up": up, "down": experts.down_proj.grad}.items():
                own = found.setdefault(path, {})
                own[name] = own.get(name, 0) + grad.square() / len(windows)
    return found


def test_fwsvd_is_the_svd_weighted_by_the_fisher_information_of_inputs(make_model, tmp_path, small):
    folder = make_model("mixtral")
    run = job(folder, tmp_path, small, "method: fwsvd, ratio: 0.4")
    [made] = run.run()
    original, compressed = moesvd_quant.load(folder), moesvd_quant.load(made)
    ranks = run.forecasts[0]["decisions"]
    for path, projections in squared_gradients(original, run.windows).items():
        experts = original.get_submodule(path)
        for name, fisher in projections.items():
            for expert in range(4):
                scale = fisher[expert].sum(0).double().sqrt().numpy()  # of each input
                weight = dense_weight(experts, name, expert).detach().double().numpy()
                u, s, v = np.linalg.svd(weight * scale, full_matrices=False)
                rank = ranks[path]["ranks"][name][expert]
                expected = (u[:, :rank] * s[:rank]) @ v[:rank] / scale
                found = compressed.get_submodule(path).dense(name, expert).detach().numpy()
                assert np.abs(found - expected).max() < 2e-3 * np.abs(expected).max(), (path, name, expert)


def parameters(decision, shapes):
    return sum(rank * sum(shapes[name]) for name, ranks in decision["ranks"].items() for rank in ranks)


SHAPES = {"gate": (96, 64), "up": (96, 64), "down": (64, 96)}
WHOLE = 4 * 3 * 96 * 64  # weights of the experts of a layer


@pytest.mark.parametrize("method", ["svd_llm", "plain"])
def test_owl_gives_layers_with_many_outliers_more_ranks(method, make_model, tmp_path, small):
    folder = make_model("mixtral", num_hidden_layers=3)
    run = job(folder, tmp_path, small, f"method: {method}, ratio: 0.5, ranks: owl")
    decisions = plan_stages(run)[0]["decisions"]
    model, scores = moesvd_quant.load(folder), []
    for index, (path, experts) in enumerate(find_experts(model)):
        statistics = run.statistics.layer(index)
        inside = path.partition(f"layers.{index}.")[2]
        found = []
        for name, weights in split_projections(experts).items():
            gram = statistics[f"{inside}/{'gram_mid' if name == 'down' else 'gram_in'}"]
            norms = gram.diagonal(dim1=1, dim2=2).sqrt()
            found.append((weights.detach().abs() * norms[:, None]).flatten())
        every = torch.cat(found)
        scores.append(float((every > 5 * every.mean()).double().mean()))
    kept = np.array(scores)
    kept = (kept - kept.min()) / (kept.max() - kept.min()) * 0.16
    kept = kept - kept.mean() + 0.5
    for decision, share in zip(decisions.values(), kept):
        assert parameters(decision, SHAPES) / WHOLE == pytest.approx(share, abs=0.02)
    assert sum(parameters(d, SHAPES) for d in decisions.values()) <= 0.5 * 3 * WHOLE


def test_the_search_truncates_what_costs_least_and_spends_the_ratio(make_model, tmp_path, small):
    folder = make_model("mixtral")
    run = job(folder, tmp_path, small, "method: asvd, ratio: 0.3, ranks: strs")
    decisions = plan_stages(run)[0]["decisions"]
    found = {(path, name): ranks for path, d in decisions.items() for name, ranks in d["ranks"].items()}
    [kept] = run.statistics.root.glob("truncation-*.safetensors")
    losses = losses_in(kept)
    assert losses.keys() == found.keys()
    tried = sorted({rank_of(ratio, (96, 64)) for ratio in RATIOS})
    chosen, held = {}, 2 * WHOLE
    for _, key, rank in sorted((loss, key, rank) for key, own in losses.items() for loss, rank in zip(own, tried)):
        if held > 0.7 * 2 * WHOLE and rank < chosen.get(key, 1000):
            chosen[key] = rank
            held = sum(4 * min(96 * 64, chosen.get(key, 1000) * 160) for key in losses)
    for key, ranks in found.items():
        base = chosen.get(key, "dense")
        assert all(rank in ((base, base + 8) if base != "dense" else ("dense",)) for rank in ranks), key
    left = 0.7 * 2 * WHOLE - sum(96 * 64 if r == "dense" else r * 160 for ranks in found.values() for r in ranks)
    assert 0 <= left < 8 * 160
    [made] = run.run()
    assert torch.isfinite(moesvd_quant.load(made)(torch.ones(1, 8, dtype=torch.long)).logits).all()


def losses_in(file):
    return {tuple(name.rsplit("/", 1)): losses.tolist() for name, losses in load_file(file).items()}


def test_what_does_not_fit_is_refused(make_model, tmp_path, small):
    folder = make_model("mixtral")
    for options, said in (
        ("method: plain, ratio: 0.3, ranks: strs", "ranks: strs is ASVD's search; use method: asvd, or ranks: owl"),
        ("ratio: 0.3, ranks: owl", "ranks: only with method: svd_llm, asvd, fwsvd or plain"),
        ("method: moe_svd, ratio: 0.3, ranks: owl", "ranks: only with method: svd_llm, asvd, fwsvd or plain"),
        ("method: fwsvd", "ratio: is required"),
    ):
        with pytest.raises(RecipeError, match=said):
            job(folder, tmp_path, small, options)
    deeper = make_model("mixtral", num_hidden_layers=3)
    with pytest.raises(StageError, match=r"svd.ranks: owl: layer \d of 3 would keep 10\d.\d%; give a ratio nearer"):
        plan_stages(job(deeper, tmp_path, small, "method: plain, ratio: 0.05, ranks: owl"))
