"""`make bench-papers`: all methods at one ratio, in the paper's order, and a sentence that follows from the figures."""

import json

import numpy as np
import pytest

from moesvd_quant.evaluation.benchmarks import papers
from moesvd_quant.evaluation.benchmarks.papers import PUBLISHED, Shape, Training, file_name, methods, order, shape_of
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.recipe.tasks import NO_TASKS

TRAINING = Training(None, 3, 2)


def test_every_method_is_a_recipe_that_removes_the_same_share():
    chosen = methods(0.2, Shape(0.8, 32), TRAINING)
    loaded = {name: load_recipe(*how) for name, how in chosen.items()}
    ratios = {name: next((s.ratio for s in r.stages if getattr(s, "ratio", None)), None) for name, r in loaded.items()}
    of_model = {name for name, r in loaded.items() if getattr(r.stages[0], "ratio_of", "") == "model"}
    assert {ratios[name] for name in of_model} == {0.2}
    first, second = loaded["MoE-I²"].stages
    assert 0.8 * (1 - (1 - first.ratio) * (1 - second.ratio)) == pytest.approx(0.2)
    others = {ratios[name] for name in chosen.keys() - of_model - {"MoE-I²"}} - {None}
    assert [round(one, 9) for one in others] == [0.25]  # of the experts, which are four fifths of the model
    assert loaded["MoE-Compression, layers"].stages[0].layers == 8
    assert methods(0.2, Shape(0.9, 2), TRAINING)["MoE-Compression, layers"][1] == ["drop.layers=1"]
    assert PUBLISHED.keys() - {"original"} <= chosen.keys()
    assert len({file_name(name) for name in chosen}) == len(chosen)


@pytest.mark.parametrize("tied", [False, True])
def test_the_share_is_that_of_the_files(tied, make_model):
    from safetensors import safe_open

    folder = make_model("mixtral", tie_word_embeddings=tied)
    sizes = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as content:
            sizes |= {name: content.get_tensor(name).numel() for name in content.keys()}  # noqa: SIM118
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    shape = shape_of(folder)
    assert shape.share == pytest.approx(experts / sum(sizes.values())) and shape.layers == 2


def test_the_sentence_counts_pairs_that_the_paper_orders_otherwise():
    windows = np.random.default_rng(0).normal(4, 1, 64)

    def record(more, noise=0.0):
        own = windows + more + np.random.default_rng(1).normal(0, noise or 1e-6, 64)
        return {"perplexity": {"t": {"window_nll": own.tolist(), "ppl": float(np.exp(own.mean()))}}}

    found = {"original": record(0), "MoE-SVD": record(0.3), "ASVD": record(0.2), "SVD-LLM": record(0.3001, 0.5)}
    said = order(found | {"unknown to the paper": record(9)}, "t")
    assert said.startswith("Of 6 pairs of methods that the paper has as well, 3 are ordered on t as there")
    assert "2 cannot be told apart here, and 1 are the other way round" in said
    assert f"ASVD ({found['ASVD']['perplexity']['t']['ppl']:.4g}; 9.44) is better than MoE-SVD (" in said


def test_a_table_in_miniature_goes_on_where_it_was(make_model, text, tmp_path, monkeypatch):
    few = lambda *_: {"REAP": ("reap", []), "ASVD": ("asvd", ["svd.ratio=0.2", "svd.ratio_of=model"])}  # noqa: E731
    monkeypatch.setattr(papers, "methods", few)
    small = [f"calibration.dataset={text}", "calibration.samples=24", "calibration.length=64"]
    given = make_model("mixtral"), tmp_path, {"words": str(text)}, 64, small, 0.2, TRAINING, NO_TASKS, "cpu"
    made, said = papers.run(*given, lambda *_: None)
    assert [row[1] for row in made.rows] == ["original", "REAP", "ASVD"]  # the smallest is not the last
    assert made.rows[0][0] == "0%" and made.rows[2][0] == "20%" and "x)" in made.rows[2][2]
    record = json.loads((tmp_path / "asvd" / "01-svd" / "eval.json").read_text())
    assert made.rows[2][3] == float(f"{record['perplexity']['words']['ppl']:.4g}")
    assert said in (tmp_path / "papers.md").read_text() and "Of 1 pairs" in said
    again = papers.run(*given, lambda what, *_: pytest.fail(what) if what.startswith("speed") else None)
    assert again == (made, said)
