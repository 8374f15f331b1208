"""Divergence and agreement in records, tables and reports, and the kinds of tokens."""

import json

import pytest
import torch
from transformers import AutoTokenizer

import moesvd_quant
from moesvd_quant import cli
from moesvd_quant.comparison.bench import cached_evaluate
from moesvd_quant.errors import UsageError
from moesvd_quant.evaluation.inputs import EvalSpec, read_text
from moesvd_quant.evaluation.kinds import KINDS, NUMBER, OTHER, REST, SIGN, SPACE, WORD, kinds
from moesvd_quant.evaluation.paper_tables import TABLES
from moesvd_quant.evaluation.published import PRINTED
from moesvd_quant.evaluation.record import evaluate, write
from moesvd_quant.evaluation.report import write_report
from moesvd_quant.model.opened import open_folder
from moesvd_quant.model.tokenizer import load_tokenizer
from moesvd_quant.reference import path as reference_path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`gptq2` of the embedded model, without an evaluation."""
    few = {"calibration.dataset": "demo", "calibration.samples": 8, "calibration.length": 128}
    more = {"calibration.self_written": 0.0, "evaluate.perplexity": []}
    return moesvd_quant.compress("reference", "gptq2", tmp_path_factory.mktemp("run"), few | more).folder


def divergences(original, folder, windows):
    """Kullback-Leibler divergence of each predicted token (n, length - 1), and whether the likeliest is the same."""
    with torch.no_grad():
        p, q = (
            moesvd_quant.load(f).float()(windows).logits[:, :-1].double().log_softmax(-1) for f in (original, folder)
        )
    return (p.exp() * (p - q)).sum(-1), p.argmax(-1) == q.argmax(-1)


@pytest.mark.parametrize("stream", [False, True])
def test_eval_has_the_divergence_of_gptq2_of_the_embedded_model(made, text, tmp_path, stream):
    original, words = reference_path(), tmp_path / "words.txt"
    words.write_text(text.read_text()[:6000] + "\nTwo signs: 3.14, (x); 好.\n" * 20)
    wanted = EvalSpec({"words": str(words)}, ("gptq", "lm-eval"), length=64, stream=stream, original=original)
    figures = evaluate(made, wanted)["perplexity"]["words"]
    tokenizer = load_tokenizer(original)
    windows = read_text(str(words), wanted, tokenizer, open_folder(original).config).windows
    each, same = divergences(original, made, windows)
    found = figures["difference"]
    assert each.mean() > 1e-2 and abs(found["mean"] - float(each.mean())) < 1e-5
    assert abs(found["top1"] - float(same.double().mean())) < 2 / each.numel()
    alone = evaluate(made, EvalSpec({"words": str(words)}, ("gptq", "lm-eval"), length=64, stream=stream))
    assert {**figures, "difference": None} == {**alone["perplexity"]["words"], "difference": None}
    of = kinds(windows, tokenizer)
    assert len(found["by_kind"]) >= 5 and sum(one["tokens"] for one in found["by_kind"].values()) == each.numel()
    for kind, one in found["by_kind"].items():
        here = of == KINDS.index(kind)
        assert abs(one["mean"] - float(each[here].mean())) < 1e-5
        assert abs(one["top1"] - float(same[here].double().mean())) < 2 / int(here.sum())


def test_a_record_without_the_difference_is_made_anew(made, text, tmp_path):
    few = tmp_path / "few.txt"
    few.write_text(text.read_text()[:3000])
    bare = EvalSpec({"few": str(few)}, length=64)
    first = cached_evaluate(made, tmp_path, bare)
    assert "difference" not in first["perplexity"]["few"]
    second = cached_evaluate(made, tmp_path, EvalSpec({"few": str(few)}, length=64, original=reference_path()))
    assert second["perplexity"]["few"]["difference"]["mean"] > 0
    third = cached_evaluate(made, tmp_path, bare)["perplexity"]["few"]  # it says all that is asked
    assert third["difference"] == second["perplexity"]["few"]["difference"]
    own = cached_evaluate(
        reference_path(), tmp_path / "original", EvalSpec({"few": str(few)}, length=64, original=reference_path())
    )
    assert "difference" not in own["perplexity"]["few"]  # of a model from itself


def test_every_table_and_the_report_show_it(made, text, tmp_path):
    few = tmp_path / "few.txt"
    few.write_text(text.read_text()[:3000])
    spec = EvalSpec({"few": str(few)}, length=64, original=reference_path())
    records = [evaluate(folder, spec) for folder in (reference_path(), made)]
    records[1]["name"] = "gptq4"  # of a column of Table 8
    found = records[1]["perplexity"]["few"]["difference"]
    divergence, same = f"{found['mean']:.4g}", f"{100 * found['top1']:.2f}"
    for number, table in (TABLES | PRINTED).items():
        if number == "tasks":
            continue
        said = table(records)
        cells = [str(cell) for row in said.rows for cell in row]
        assert any(divergence[:5] in cell for cell in cells), number
        assert any(same[:4] in cell for cell in cells), number
    folder = tmp_path / "out" / "01-gptq"
    folder.mkdir(parents=True)
    for file in made.iterdir():
        (folder / file.name).symlink_to(file)
    write(records[1], folder / "eval.json")
    write(records[0], tmp_path / "out" / "00-original" / "eval.json")
    write_report(tmp_path / "out", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "few: divergence" in page and "Divergence against bytes" in page and divergence in page


def test_the_verb_and_the_function(made, text, capsys, monkeypatch, tmp_path):
    few = tmp_path / "few.txt"
    few.write_text(text.read_text()[:3000])
    options = ["--text", f"few={few}", "--length", "64", "--original", "reference", "--out", str(tmp_path / "records")]
    monkeypatch.setattr("sys.argv", ["moesvd", "eval", str(made), *options, "--json"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    [record] = json.loads(capsys.readouterr().out)
    again = moesvd_quant.evaluate(made, {"few": str(few)}, original="reference", length=64)
    assert again.divergence["few"] == pytest.approx(record["perplexity"]["few"]["difference"]["mean"], rel=1e-5)
    assert 0 < again.agreement["few"] < 1
    said = moesvd_quant.api.frame([again])
    assert said["few: divergence"][0] == again.divergence["few"]


def test_another_tokenizer_is_refused_before_any_work(made, make_model, text):
    with pytest.raises(UsageError, match="has another tokenizer than"):
        evaluate(made, EvalSpec({"words": str(text)}, length=64, original=make_model("mixtral")))


TEXT = "Hello world, don't stop: 3.14 (roughly) pi — Привет 好\n    def f"


def test_kinds_are_of_what_a_token_says():
    tokenizer = AutoTokenizer.from_pretrained(reference_path())
    ids = torch.tensor([tokenizer(TEXT, add_special_tokens=False).input_ids])
    of = [KINDS[place] for place in kinds(ids, tokenizer)[0].tolist()]
    found = dict(zip(tokenizer.convert_ids_to_tokens(ids[0, 1:]), of))
    expected = {"Ġworld": WORD, ",": SIGN, "'t": REST, "ly": REST, "Ġ3": NUMBER, "14": NUMBER, "rough": WORD}
    expected |= {"Ġ(": SIGN, "Ċ": SPACE, "Ġdef": WORD, "е": OTHER, "ĠÐ": OTHER}
    assert {token: found[token] for token in expected if token in found} == {
        t: expected[t] for t in expected if t in found
    }
    assert len(set(expected) & set(found)) >= 9


def test_tokenizers_that_drop_the_space_in_front_say_the_same():
    """As SentencePiece does: a text begins with a space that is not shown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: place for place, token in enumerate(["<unk>", "▁new", "▁word", "ly", "▁12", ",", "▁", "好"])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    ids = torch.tensor([[vocabulary[t] for t in ("▁new", "▁word", "ly", ",", "▁12", "▁", "好", "▁new")]])
    assert [KINDS[p] for p in kinds(ids, tokenizer)[0].tolist()] == [WORD, REST, SIGN, NUMBER, SPACE, OTHER, WORD]
