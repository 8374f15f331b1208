"""What is kept of a measurement is of the model, the texts and the dtype that are asked for, or it is made anew."""

import hashlib
import json
import shutil

import pytest
import torch

from moesvd_quant.comparison.bench import cached_evaluate, compare
from moesvd_quant.evaluation import record
from moesvd_quant.evaluation.inputs import EvalSpec
from moesvd_quant.runtime import modeling_moesvd
from moesvd_quant.runtime.modeling_moesvd import check_digests, file_digest


def test_the_baseline_of_another_model_is_not_taken(make_model, text, tmp_path, small):
    first, second = make_model("mixtral"), make_model("mixtral", torch.bfloat16, seed=1)
    texts = {"words": str(text)}
    one = compare(first, ["gptq4"], tmp_path, texts, 64, small)[0][0]["perplexity"]["words"]["ppl"]
    two = compare(second, ["gptq3"], tmp_path, texts, 64, small)[0][0]["perplexity"]["words"]["ppl"]
    alone = cached_evaluate(second, tmp_path / "alone", EvalSpec(texts, length=64))["perplexity"]["words"]["ppl"]
    assert two == alone != one


CHANGES = ["nothing", "content", "texts", "length", "weights", "tokenizer", "threads", "version", "lm-eval"]


@pytest.mark.parametrize("change", CHANGES)
def test_a_record_is_used_again_where_nothing_changed(make_model, text, tmp_path, monkeypatch, change):
    folder, calls = shutil.copytree(make_model("mixtral"), tmp_path / "model"), []
    words = tmp_path / "words.txt"
    words.write_text(text.read_text()[:8000])
    wanted = EvalSpec({"words": str(words)}, length=64)
    cached_evaluate(folder, tmp_path / "out", wanted)
    real = record.evaluate

    def counted(*given, **more):
        calls.append(given)
        return real(*given, **more)

    monkeypatch.setattr("moesvd_quant.comparison.bench.evaluate", counted)
    if change == "content":
        words.write_text(words.read_text()[::-1])
    if change == "texts":
        (tmp_path / "other.txt").write_text(words.read_text()[1:])
        wanted = EvalSpec({"other": str(tmp_path / "other.txt")}, length=64)
    if change == "length":
        wanted = EvalSpec({"words": str(words)}, length=32)
    if change == "lm-eval":
        wanted = EvalSpec({"words": str(words)}, ("lm-eval",), length=64)
    if change == "weights":
        other = make_model("mixtral", seed=1)
        shutil.copy(other / "model.safetensors", folder)
    if change == "tokenizer":
        content = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(content | {"clean_up_tokenization_spaces": True}))
    if change == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    if change == "version":
        monkeypatch.setattr("moesvd_quant.evaluation.inputs.version", lambda name: "0.0")
    found = cached_evaluate(folder, tmp_path / "out", wanted)
    assert len(calls) == (change != "nothing")
    alone = real(folder, wanted)["perplexity"]
    assert all(found["perplexity"][name]["ppl"] == alone[name]["ppl"] for name in alone if "ppl" in alone[name])


def test_a_file_is_hashed_once_in_a_process_unless_it_changes(tmp_path, monkeypatch):
    file, calls, real = tmp_path / "x.safetensors", [], hashlib.file_digest

    def counted(*given):
        calls.append(given)
        return real(*given)

    monkeypatch.setattr(modeling_moesvd.hashlib, "file_digest", counted)
    file.write_bytes(b"one")
    assert file_digest(file) == file_digest(file) == hashlib.sha256(b"one").hexdigest() and len(calls) == 1
    file.write_bytes(b"others")
    assert file_digest(file) == hashlib.sha256(b"others").hexdigest() and len(calls) == 2
    (tmp_path / "moesvd.json").write_text(f'{{"digests": {{"x.safetensors": "{file_digest(file)}"}}}}')
    check_digests(tmp_path)
    assert len(calls) == 2
