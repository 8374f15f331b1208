"""Perplexity against transformers' own loss; tables and plots of records."""

import csv
import io
import json
import math
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from moesvd_quant import load
from moesvd_quant.errors import MoesvdError
from moesvd_quant.evaluation.inputs import EvalSpec
from moesvd_quant.evaluation.memory import disk_bytes, peak_bytes, resident_bytes
from moesvd_quant.evaluation.opening import streamed
from moesvd_quant.evaluation.paper_tables import table8
from moesvd_quant.evaluation.perplexity import (
    document_perplexity,
    in_memory,
    perplexity,
    relative_change,
    rolling_windows,
)
from moesvd_quant.evaluation.plot import family, plot_bytes
from moesvd_quant.evaluation.record import answers, collect, evaluate, write
from moesvd_quant.evaluation.table import render
from tiny import tiny_model

WINDOWS = torch.randint(1, 250, (5, 32), generator=torch.Generator().manual_seed(3))


class Uniform(torch.nn.Linear):
    """Gives every token the same probability."""

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 320))


def few_lines(folder, windows):
    """The definition, written down again: nats per predicted token, from transformers alone."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return sum(float(model(w[None], labels=w[None]).loss) for w in windows) / len(windows)


@pytest.mark.parametrize("batch_size", [1, 3, None])
@pytest.mark.parametrize("how", ["in memory", "streaming"])
@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_it_is_the_exponential_of_the_models_own_loss(make_model, architecture, how, batch_size):
    folder = make_model(architecture)
    logits = in_memory(load(folder)) if how == "in memory" else streamed(folder, torch.float32, "cpu").logits
    found = perplexity(logits, WINDOWS, batch_size)
    assert found.ppl == pytest.approx(math.exp(few_lines(folder, WINDOWS)), rel=1e-5)
    assert (found.tokens, found.windows, found.length) == (5 * 31, 5, 32)
    assert sum(found.window_nll) / 5 == pytest.approx(found.nll)


def test_a_model_that_knows_nothing_has_the_size_of_the_vocabulary():
    found = perplexity(in_memory(Uniform(1, 1)), WINDOWS)
    assert found.ppl == pytest.approx(320) and found.interval == pytest.approx((320, 320))
    assert perplexity(in_memory(Uniform(1, 1)), WINDOWS[:1]).interval is None


def test_the_interval_is_that_of_the_mean_loss():
    """Against the normal approximation, which is right for many windows."""
    windows = torch.randint(1, 250, (200, 8), generator=torch.Generator().manual_seed(0))
    found = perplexity(in_memory(tiny_model("mixtral")), windows)
    each = np.array(found.window_nll)
    error = 1.96 * each.std(ddof=1) / math.sqrt(200)
    assert np.log(found.interval) == pytest.approx([each.mean() - error, each.mean() + error], abs=0.15 * error)


def test_a_change_is_judged_window_by_window():
    draw = np.random.default_rng(0)
    hard = draw.normal(4, 1, 300)  # windows differ much, the models little
    found = relative_change((hard + 0.01 + draw.normal(0, 0.005, 300)).tolist(), hard.tolist())
    assert 0.009 < found["low"] < found["change"] < found["high"] < 0.011
    with pytest.raises(ValueError, match="same protocol"):
        relative_change([1.0], [1.0, 2.0])


def test_documents_are_rolled_as_lm_eval_rolls_them(make_model):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    folder = make_model("mixtral")
    draw = random.Random(0)
    texts = [" ".join("".join(draw.choices("abcdefgh", k=3)) for _ in range(40)) + " ", "ghi jkl mno", "x"]
    model, tokenizer = load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, max_length=48, batch_size=2)
    asked = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    total = -sum(lm.loglikelihood_rolling(asked, disable_tqdm=True))
    found = document_perplexity(
        streamed(folder, torch.float32, "cpu").logits, texts, rolling_windows(texts, tokenizer, 48), 48, 2
    )
    assert found["byte_ppl"] == pytest.approx(math.exp(total / (160 + 11 + 1)), rel=1e-5)
    assert found["word_ppl"] == pytest.approx(math.exp(total / (41 + 3 + 1)), rel=1e-5)  # a trailing blank counts one
    assert found["bits_per_byte"] == pytest.approx(math.log2(found["byte_ppl"]))


def test_a_loss_that_is_not_finite_names_its_window():
    model = tiny_model("mixtral")
    with torch.no_grad():
        model.model.embed_tokens.weight[WINDOWS[3, 5]] = float("nan")
    with pytest.raises(ValueError, match=r"window \d: the loss is nan"):
        perplexity(in_memory(model), WINDOWS)


def test_memory_counts_every_tensor_once(make_model):
    folder = make_model("mixtral")
    model = tiny_model("mixtral")
    sizes = disk_bytes(folder)
    assert sum(size for kind, size in sizes.items() if kind != "total") == sum(
        4 * p.numel() for p in model.parameters()
    )
    assert sizes["total"] == (folder / "model.safetensors").stat().st_size
    assert sizes["experts"] == sum(4 * p.numel() for n, p in model.named_parameters() if ".experts." in n)
    assert sizes["router"] == sum(4 * p.numel() for n, p in model.named_parameters() if n.endswith("mlp.gate.weight"))
    tied = tiny_model("mixtral", tie_word_embeddings=True)
    assert resident_bytes(tied) == sum(4 * p.numel() for p in tied.parameters()) + sum(
        b.numel() * b.element_size() for b in tied.buffers()
    )


def test_peak_is_measured_in_a_process_of_its_own(make_model, monkeypatch):
    figures = peak_bytes(make_model("mixtral"))
    assert figures["peak_rss_bytes"] >= figures["import_rss_bytes"] > 10**8
    monkeypatch.setattr("sys.executable", shutil.which("false"))
    with pytest.raises(MoesvdError, match="measuring memory failed"):
        peak_bytes("nowhere")


def test_record_holds_what_was_measured_and_how(make_model, text):
    record = evaluate(make_model("mixtral"), EvalSpec({"words": str(text)}, length=64))
    assert record["name"] == "original" and record["accounting"]["bits_per_expert_weight"] == 32
    assert record["protocol"]["length"] == 64 and record["protocol"]["texts"]["words"]["source"] == str(text)
    assert record["perplexity"]["words"]["ppl"] > 1
    with pytest.raises(ValueError, match="protocol gptq2: is none of gptq, lm-eval"):
        evaluate(make_model("mixtral"), EvalSpec({"words": str(text)}, ("gptq2",)))


def test_what_does_not_fit_streams_and_says_the_same(make_model, text, monkeypatch):
    folder, wanted = make_model("mixtral"), EvalSpec({"words": str(text)}, ("gptq", "lm-eval"), length=64)
    whole = evaluate(folder, wanted)
    seen = []
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10**5))
    monkeypatch.setattr("moesvd_quant.load", None)  # it would be called to open the model whole
    parts = evaluate(folder, wanted, progress=lambda what, done, total: seen.append(what))
    for figures in ("ppl", "lm_eval"):
        assert parts["perplexity"]["words"][figures] == pytest.approx(whole["perplexity"]["words"][figures], rel=1e-5)
    assert parts["memory"] == whole["memory"] and "layers" in seen
    with pytest.raises(ValueError, match="tasks need the whole model"):
        evaluate(folder, EvalSpec(tasks=("piqa",)))


PROTOCOL = {"length": 64, "dtype": "f", "tokenizer": "t", "computed": {"torch": "2"}}


def a_record(texts: dict, fingerprint="a", names=("gptq",), **more) -> dict:
    """A record of texts {name: digest}, with `more` in another protocol."""
    protocol = {"perplexity": dict.fromkeys(names, "..."), **PROTOCOL, "texts": texts} | more.pop("protocol", {})
    figures = {text: {name: digest for name in names} for text, digest in texts.items()}
    return {"fingerprint": fingerprint, "protocol": protocol, "perplexity": figures, "memory": {"a": 1}} | more


def written(folder, *records) -> dict:
    for made in records:
        write(made, folder / "eval.json")
    return json.loads((folder / "eval.json").read_text())


def test_a_record_keeps_what_was_measured_before_of_the_same_weights(tmp_path):
    zero_shot = {"tasks": {"piqa": {}}, "protocol": {"limit": None}, "data": None}
    joined = written(tmp_path, a_record({"x": 1}), a_record({"y": 1}), a_record({}, zero_shot=zero_shot))
    assert set(joined["perplexity"]) == set(joined["protocol"]["texts"]) == {"x", "y"} and "zero_shot" in joined
    both = written(tmp_path, a_record({"x": 1}, names=("lm-eval",)))
    assert both["perplexity"]["x"] == {"gptq": 1, "lm-eval": 1}
    # Another content of a text: its figures go, those of other texts stay.
    other = written(tmp_path, a_record({"x": 2}))
    assert other["perplexity"] == {"x": {"gptq": 2}, "y": {"gptq": 1}} and other["protocol"]["texts"]["x"] == 2
    shorter = written(tmp_path, a_record({"z": 1}, protocol={"length": 32}))
    assert set(shorter["perplexity"]) == {"z"} and "zero_shot" in shorter
    assert "zero_shot" not in written(tmp_path, a_record({"z": 1}, "other weights"))
    written(tmp_path, a_record({}, zero_shot=zero_shot))
    assert "zero_shot" not in written(tmp_path, a_record({"z": 1}, protocol={"tokenizer": "another"}))


def test_a_record_answers_for_nothing_but_its_own_inputs():
    zero_shot = {"tasks": {"piqa": {}}, "protocol": {"limit": None}, "data": None}
    record, asked = a_record({"x": 1}, zero_shot=zero_shot), PROTOCOL | {"texts": {"x": 1}}
    assert answers(record, "a", asked, EvalSpec({"x": "x"}, tasks=("piqa",)))
    assert answers(record, "a", asked, EvalSpec({}))
    assert not answers(record, "b", asked, EvalSpec())
    for key, other in {"length": 32, "dtype": "g", "tokenizer": "u", "computed": {"torch": "3"}}.items():
        assert not answers(record, "a", asked | {key: other}, EvalSpec())
    assert not answers(record, "a", asked | {"texts": {"x": 2}}, EvalSpec({"x": "x"}))
    more = [
        EvalSpec(tasks=("zero-shot",)),
        EvalSpec(peak=True),
        EvalSpec(tasks=("piqa",), limit=3),
        EvalSpec({"x": "x"}, ("lm-eval",)),
        EvalSpec(tasks=("piqa",), task_data=str(Path(__file__).parent)),
    ]
    for wanted in more:
        assert not answers(record, "a", asked, wanted)


RECORDS = [
    {
        "name": name, "path": name, "fingerprint": name, "protocol": {"length": 64}, "perplexity": {"a": {"ppl": ppl}},
        "memory": {"disk_bytes": size, "resident_bytes": size},
        "accounting": {"bits_per_expert_weight": 4.25, "expert_ratio": 0.4, "model_ratio": 0.3},
    }
    for name, size, ppl in (("gptq4", 4_000_000, 61.5), ("original", 16_000_000, 61.0), ("gptq3", 3_000_000, 63.0))
]  # fmt: skip


def test_table_8_is_sorted_by_bytes_in_every_form():
    table = table8(RECORDS)
    assert [row[0] for row in table.rows] == ["original", "gptq4", "gptq3"]
    rows = list(csv.reader(io.StringIO(render(table, "csv"))))
    assert rows[0] == table.columns and rows[2][:2] == ["gptq4", "4.0"] and rows[2][-1] == "61.5"
    assert json.loads(render(table, "json"))[2]["a"] == 63.0
    assert "| gptq3 | 3.0 |" in render(table, "markdown") and "gptq3" in render(table)
    with pytest.raises(ValueError, match="none of terminal"):
        render(table, "html")


def test_records_are_collected_from_folders_and_runs(tmp_path):
    runs, tmp_path = tmp_path, tmp_path / "run"
    for record in RECORDS:
        write(record, tmp_path / record["name"] / "eval.json")
    assert len(collect([tmp_path])) == len(collect([runs])) == 3
    assert [r["name"] for r in collect([tmp_path / "gptq4", tmp_path / "gptq3"])] == ["gptq4", "gptq3"]
    with pytest.raises(ValueError, match=r"none: no eval.json in it or below"):
        collect([tmp_path / "none"])


def test_the_plot_is_a_png(tmp_path):
    plot_bytes(RECORDS, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    "name,kind",
    [("gptq4", "gptq"), ("svd40-gptq3", "svd-gptq"), ("svd-gptq@2.28bpw", "svd-gptq@"), ("d2-fisher40", "d2-fisher")],
)
def test_points_of_one_method_are_one_line(name, kind):
    assert family(name) == kind
