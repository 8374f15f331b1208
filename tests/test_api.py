"""The Python interface does what the commands do, with typed results."""

import json

import pytest
import torch

import moesvd_quant
from moesvd_quant.calibration.rows import TextError
from moesvd_quant.errors import UsageError
from moesvd_quant.memory.files import read_json
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.recipe.recipe import RecipeError


@pytest.fixture
def recipe(text):
    calibration = {"dataset": str(text), "samples": 24, "length": 64}
    measured = {"perplexity": {"words": str(text)}, "length": 64}
    return {"calibration": calibration, "stages": [{"gptq": {"bits": 4}}], "evaluate": measured}


def test_plan_compress_evaluate_load_compare(make_model, tmp_path, recipe, text):
    model, heard = make_model("mixtral"), []
    planned = moesvd_quant.plan(model, recipe, tmp_path / "out", {"gptq.bits": 3}, device="cpu")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("0*"))
    report = lambda what, done, total: heard.append(what)  # noqa: E731
    made = moesvd_quant.compress(model, recipe, tmp_path / "out", {"gptq.bits": 3}, device="cpu", report=report)
    assert any(what.startswith("gptq") for what in heard)
    size = sum(file.stat().st_size for file in made.folder.glob("*.safetensors"))
    [stage] = planned.stages
    assert (stage.stage, stage.accounting["disk_bytes"]) == ("gptq", size)
    assert planned.to_pandas().loc[0, "disk_bytes"] == size and planned.needs.to_dict()
    first, last = made.evaluation
    assert last.disk_bytes == size and last.folder == made.folder.resolve()
    assert made.to_pandas()["words"].tolist() == [first.perplexity["words"], last.perplexity["words"]]

    measured = moesvd_quant.evaluate(made.folder, {"words": str(text)}, length=64, device="cpu")
    assert measured.perplexity == last.perplexity
    loaded = moesvd_quant.load(made.folder)
    assert torch.isfinite(loaded(torch.tensor([[1, 2, 3]])).logits).all()
    found = moesvd_quant.compare(model, {"mine": made.folder}, {"words": str(text)}, length=64, device="cpu")
    ratio = last.perplexity["words"] / first.perplexity["words"]
    assert found["words"]["mine"].change["change"] == pytest.approx(ratio - 1, abs=1e-4)
    again = moesvd_quant.compress(model, recipe, tmp_path / "out", ["gptq.bits=3"], device="cpu")
    assert again.checkpoints == made.checkpoints


def test_a_recipe_is_a_name_a_file_or_its_content(tmp_path):
    content = {"seed": 3, "stages": [{"svd": {"ratio": 0.5}}, {"gptq": {"bits": 4}}]}
    (tmp_path / "mine.yaml").write_text(json.dumps(content))
    given, read = load_recipe(content, ["svd.ratio=0.25"]), load_recipe(tmp_path / "mine.yaml", ["svd.ratio=0.25"])
    assert given.model_copy(update={"name": read.name}) == read and given.name == "recipe"
    with pytest.raises(RecipeError, match=r"recipe:\d+: stages\[0\].svd.ratoi: unknown key; did you mean 'ratio'"):
        load_recipe({"stages": [{"svd": {"ratoi": 0.5}}]})


def test_errors_are_those_of_the_commands(make_model, tmp_path, recipe):
    with pytest.raises(UsageError, match="no such folder"):
        moesvd_quant.compress(tmp_path / "nowhere", recipe, tmp_path / "out")
    with pytest.raises(UsageError, match="no model: give"):
        moesvd_quant.plan(None, recipe)
    with pytest.raises(UsageError, match="--device tpu"):
        moesvd_quant.evaluate(make_model("mixtral"), [], device="tpu")


def test_a_text_that_cannot_be_evaluated_on_stops_a_run_before_work(make_model, tmp_path, recipe, text):
    model = make_model("mixtral")
    (tmp_path / "short.txt").write_text("few")
    (tmp_path / "broken.jsonl").write_text('{"text": "good"}\n{"text": 5}\n')
    for given, said in (
        ([str(text), str(tmp_path / "gone.txt")], r"evaluate.perplexity\[1\]: .*gone.txt: no such file"),
        ({"words": str(tmp_path / "broken.jsonl")}, r"evaluate.perplexity.words: .*broken.jsonl.*row 2: text is int"),
        ([str(tmp_path / "short.txt")], r"evaluate.perplexity\[0\]: the text has 3 tokens; one window needs 64"),
    ):
        asked = recipe | {"evaluate": {"perplexity": given, "length": 64}}
        with pytest.raises(TextError, match=said):
            moesvd_quant.compress(model, asked, tmp_path / "out", device="cpu")
        assert not list((tmp_path / "out").glob("0*")) and not (tmp_path / "out" / "plan.json").exists()


def test_what_a_plan_shows_is_what_is_kept(make_model, tmp_path, recipe):
    model = make_model("mixtral")
    planned = moesvd_quant.plan(model, recipe, tmp_path / "out", device="cpu")
    made = moesvd_quant.compress(model, recipe, tmp_path / "out", device="cpu")
    kept = read_json(made.folder / "moesvd.json")["accounting"]
    assert kept == planned.stages[0].accounting
