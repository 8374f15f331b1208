"""Perplexity against transformers' own loss; tables and plots of records."""

import csv
import io
import json
import math
from types import SimpleNamespace

import pytest
import torch
from moesvd_quant.evaluation.memory import disk_bytes, peak_bytes, resident_bytes
from moesvd_quant.evaluation.perplexity import perplexity
from moesvd_quant.evaluation.plot import family, plot_bytes
from moesvd_quant.evaluation.record import collect, evaluate, write
from moesvd_quant.evaluation.table import render, table8
from tiny import tiny_model

WINDOWS = torch.randint(1, 250, (5, 32), generator=torch.Generator().manual_seed(3))


class Uniform(torch.nn.Linear):
    """Gives every token the same probability."""

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 320))


def test_it_is_the_exponential_of_the_models_own_loss():
    model = tiny_model("mixtral")
    with torch.no_grad():
        losses = [float(model(window[None], labels=window[None]).loss) for window in WINDOWS]
    found = perplexity(model, WINDOWS)
    assert found.ppl == pytest.approx(math.exp(sum(losses) / 5), rel=1e-5)
    assert (found.tokens, found.windows, found.length) == (5 * 31, 5, 32)
    assert perplexity(model, WINDOWS, batch_size=2).nll == pytest.approx(found.nll, rel=1e-6)


def test_a_model_that_knows_nothing_has_the_size_of_the_vocabulary():
    assert perplexity(Uniform(1, 1), WINDOWS).ppl == pytest.approx(320)


def test_a_loss_that_is_not_finite_names_its_window():
    model = tiny_model("mixtral")
    with torch.no_grad():
        model.model.embed_tokens.weight[WINDOWS[3, 5]] = float("nan")
    with pytest.raises(ValueError, match=r"window \d: the loss is nan"):
        perplexity(model, WINDOWS)


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


def test_peak_is_measured_in_a_process_of_its_own(make_model):
    figures = peak_bytes(make_model("mixtral"))
    assert figures["peak_rss_bytes"] >= figures["import_rss_bytes"] > 10**8
    with pytest.raises(RuntimeError, match="measuring memory failed"):
        peak_bytes("nowhere")


def test_record_holds_what_was_measured_and_how(make_model, text):
    record = evaluate(make_model("mixtral"), {"words": str(text)}, 64)
    assert record["name"] == "original" and record["accounting"]["bits_per_expert_weight"] == 32
    assert record["protocol"]["length"] == 64 and record["protocol"]["texts"] == {"words": str(text)}
    assert record["perplexity"]["words"]["ppl"] > 1


RECORDS = [
    {
        "name": name, "path": name, "protocol": {"length": 64}, "perplexity": {"a": {"ppl": ppl}},
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
        render(table, "latex")


def test_records_are_collected_from_folders_and_runs(tmp_path):
    for record in RECORDS:
        write(record, tmp_path / record["name"] / "eval.json")
    assert len(collect([tmp_path])) == 3
    assert [r["name"] for r in collect([tmp_path / "gptq4", tmp_path / "gptq3"])] == ["gptq4", "gptq3"]
    with pytest.raises(ValueError, match=r"run `moesvd eval"):
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
