"""`moesvd compare`: divergences against a few independent lines, and what a user sees."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch

import moesvd_quant
from moesvd_quant import cli
from moesvd_quant.errors import UsageError
from moesvd_quant.evaluation import original
from moesvd_quant.evaluation.compare import FLOOR, compare, write_beside
from moesvd_quant.evaluation.difference import difference
from moesvd_quant.evaluation.inputs import EvalSpec, read_text
from moesvd_quant.model.opened import open_folder
from moesvd_quant.model.stream import StreamedModel
from moesvd_quant.model.tokenizer import load_tokenizer
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.run.run import Run


def quiet(what, done, total):
    pass


@pytest.fixture
def pair(make_model, tmp_path, small):
    """A model and its 2-bit result."""
    folder = make_model("mixtral")
    recipe = load_recipe("gptq2", [*small, "evaluate.perplexity=[]"])
    return folder, Run(recipe, folder, tmp_path / "out").run()[-1]


def test_divergence_is_that_of_transformers_on_logits(pair, text):
    original, made = pair
    wanted = EvalSpec({"words": str(text)}, length=64)
    found = compare(original, {"gptq2": made}, wanted, "cpu", quiet)["words"]
    windows = read_text(str(text), wanted, load_tokenizer(original), open_folder(original).config).windows
    with torch.no_grad():
        p, q = (moesvd_quant.load(folder).float()(windows).logits[:, :-1].double() for folder in pair)
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    each = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    one = found["gptq2"]
    assert one.tokens == each.numel() == len(windows) * 63
    assert abs(one.mean - float(each.mean())) < 1e-5 and each.mean() > 1e-3
    assert abs(one.largest - float(each.max())) < 1e-5
    ordered = sorted(each.flatten().tolist())
    for value, share in ((one.median, 0.5), (one.high99, 0.99), (one.high999, 0.999)):
        assert abs(value - ordered[math.ceil(share * len(ordered)) - 1]) < 1e-5
    assert abs(one.top1 - float((p.argmax(-1) == q.argmax(-1)).double().mean())) < 2 / one.tokens
    wanted_tokens = windows[:, 1:, None]
    losses = [-float(log.gather(2, wanted_tokens).mean()) for log in (log_p, log_q)]
    assert abs(one.change["change"] - math.expm1(losses[1] - losses[0])) < 1e-5
    assert one.change["low"] < one.change["change"] < one.change["high"]
    parts = [float(part.mean()) for part in each.tensor_split(4, dim=1)]
    assert one.by_position == pytest.approx(parts, abs=1e-5)
    here = windows[:, 1:] == load_tokenizer(original)(" ").input_ids[-1]  # tokens are bytes, and words are apart by one
    assert one.by_kind["white space"].tokens == int(here.sum()) > 0
    assert abs(one.by_kind["white space"].mean - float(each[here].mean())) < 1e-5
    assert sum(of.tokens for of in one.by_kind.values()) == one.tokens


def test_the_original_is_walked_once_for_all_models_on_a_text(pair, text, monkeypatch):
    folder, made = pair
    walks, walk = [], StreamedModel.walk
    monkeypatch.setattr(original, "_walked", {})
    monkeypatch.setattr(
        StreamedModel, "walk", lambda model, *given: (walks.append(model.folder), walk(model, *given))[1]
    )
    wanted = EvalSpec({"words": str(text)}, length=64)
    first, second = (compare(folder, {"gptq2": made}, wanted, "cpu", quiet) for _ in range(2))
    assert first == second
    assert (walks.count(folder), walks.count(made)) == (1, 2)
    compare(folder, {"gptq2": made}, replace(wanted, length=32), "cpu", quiet)  # other windows
    assert walks.count(folder) == 2


def test_a_model_beside_itself_and_beside_its_own_dtype(make_model, text):
    folder = make_model("mixtral", dtype=torch.bfloat16)
    found = compare(folder, {"same": folder}, EvalSpec({"words": str(text)}, length=64), "cpu", quiet)["words"]
    assert list(found) == [FLOOR, "same"]
    assert found["same"].mean == 0 and found["same"].top1 == 1
    assert 0 < found[FLOOR].mean < 0.01


def test_what_is_broken_is_named():
    windows = torch.randint(0, 5, (2, 4), generator=torch.Generator().manual_seed(0))
    good = torch.zeros(2, 4, 5)
    bad = good.clone()
    bad[1, 2, 3] = torch.nan
    with pytest.raises(UsageError, match="window 1: logits are not finite"):
        difference([good], [bad], windows, torch.zeros(2, 3, dtype=torch.long))


def test_padded_vocabularies_are_compared_where_both_know_tokens():
    windows = torch.randint(0, 5, (2, 4), generator=torch.Generator().manual_seed(0))
    logits = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(1))
    padded = torch.cat([logits, torch.full((2, 4, 3), -20.0)], -1)
    of = torch.zeros(2, 3, dtype=torch.long)
    assert difference([logits], [padded[:1], padded[1:]], windows, of).mean == 0


def test_models_of_other_tokenizers_are_refused(make_model, tmp_path, text):
    folder, other = make_model("mixtral"), tmp_path / "other"
    shutil.copytree(folder, other)
    described = json.loads((other / "tokenizer.json").read_text())
    described["added_tokens"] = []
    described["normalizer"] = {"type": "Lowercase"}
    (other / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(UsageError, match="other: has another tokenizer"):
        compare(folder, {"other": other}, EvalSpec({"words": str(text)}, length=64), "cpu", quiet)


def test_what_models_write_is_theirs_and_the_first_difference_is_marked(pair):
    original, made = pair
    [beside] = write_beside(original, {"gptq2": made}, ["the model of"], 24, "cpu", quiet)
    tokenizer, said = load_tokenizer(original), []
    for folder in pair:
        model, given = moesvd_quant.load(folder), tokenizer("the model of", return_tensors="pt").input_ids
        said.append(model.generate(given, max_new_tokens=24, do_sample=False)[0, given.shape[1] :].tolist())
    same = next((i for i, (a, b) in enumerate(zip(*said)) if a != b), 24)
    first, second = beside
    assert (first.model, first.same) == ("original", len(said[0])) and first.text == tokenizer.decode(said[0])
    assert second.same == same and second.text.replace(" >>", "") == (
        tokenizer.decode(said[1][:same]) + tokenizer.decode(said[1][same:])
    )
    assert (" >>" in second.text) == (same < len(said[1]))


def test_the_verb(pair, text, capsys, monkeypatch):
    original, made = map(str, pair)
    options = ["--text", f"words={text}", "--length", "64", "--prompt", "the", "--tokens", "4", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["moesvd", "compare", original, made, *options, "--json"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    found = json.loads(capsys.readouterr().out)
    assert found["texts"]["words"]["01-gptq"]["mean"] > 0 and len(found["prompts"][0]) == 2
    monkeypatch.setattr("sys.argv", ["moesvd", "compare", original, made, *options])
    with pytest.raises(SystemExit):
        cli.main()
    said = capsys.readouterr().out
    assert "thousandths of a nat" in said and "01-gptq" in said and "tokens the same" in said
