"""The front on a tiny model, and NF4's bytes against bitsandbytes' own."""

import json

import pytest
import torch

import moesvd_quant
from moesvd_quant.comparison import pareto
from moesvd_quant.comparison.pareto import front, nf4_record
from moesvd_quant.evaluation.inputs import EvalSpec


@pytest.mark.slow
def test_front_holds_budgets_baselines_and_nf4(make_model, tmp_path, text, monkeypatch):
    baselines = ("gptq4", "gptq2")
    monkeypatch.setattr(pareto, "BASELINES", baselines)  # all of them are run by the tests of recipes
    folder = make_model("mixtral", torch.bfloat16)
    small = [f"calibration.dataset={text}", "calibration.samples=24", "calibration.length=64"]
    records, table, judged = front(folder, tmp_path, ["2bpw"], {"words": str(text)}, 64, "fast", small)
    names = [record["name"] for record in records]
    assert len(set(names)) == len(records) and {"nf4", *baselines, "fit-fast@2bpw"} < set(names)
    assert {"drop+3bit@2bpw", "merge+3bit@2bpw", "ranks+16bit@2bpw", "ranks+3bit@2bpw", "trellis@2bpw"} < set(names)
    assert judged.rows and judged.rows[0][0] == "2bpw"
    assert "fit-fast" in (tmp_path / "routes.md").read_text()
    sizes = {r["name"]: r["memory"]["disk_bytes"] for r in records}
    assert all(size <= sizes[f"fit-fast@{name.partition('@')[2]}"] for name, size in sizes.items() if "@" in name)
    assert sizes["gptq2"] < sizes["nf4"] < sizes["original"]
    assert len(table.rows) == len(records)
    assert (tmp_path / "perplexity-against-bytes.png").is_file()


def test_nf4_is_what_bitsandbytes_makes_of_the_weights(make_model, tmp_path, text):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    folder = make_model("mixtral")
    record = nf4_record(folder, tmp_path / "nf4", EvalSpec({"words": str(text)}, length=64))
    assert record["base_model"] == folder.name
    model = moesvd_quant.load(folder)
    saved = 0
    for name, parameter in model.named_parameters():
        if "experts" in name or "_proj" in name:
            codes, state = quantize_4bit(parameter.data, quant_type="nf4")
            parameter.data = dequantize_4bit(codes, state)
            saved += 4 * parameter.numel() - codes.nbytes - state.absmax.nbytes
    windows = json.loads((tmp_path / "nf4" / "eval.json").read_text())["perplexity"]["words"]
    assert record["perplexity"]["words"]["ppl"] == windows["ppl"]
    plain = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert abs(record["memory"]["disk_bytes"] - (plain - saved)) < 2000  # headers differ
    model.save_pretrained(tmp_path / "own")
    from moesvd_quant.evaluation.record import evaluate
    from tiny import tiny_tokenizer

    tiny_tokenizer().save_pretrained(tmp_path / "own")
    own = evaluate(tmp_path / "own", EvalSpec({"words": str(text)}, length=64))
    assert abs(own["perplexity"]["words"]["nll"] - windows["nll"]) < 1e-6
