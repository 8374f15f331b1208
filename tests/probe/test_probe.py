"""The verb on tiny models: complete, repeatable, and true where the answer is known."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from moesvd_quant import load
from moesvd_quant.cli.common import app
from moesvd_quant.evaluation.perplexity import in_memory, perplexity
from moesvd_quant.model.folder import ModelError
from moesvd_quant.probe.survey import RATIOS
from moesvd_quant.probe.texts import probe_folder
from moesvd_quant.probe.verdict import verdict
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.run.run import Run


def look(folder, small, texts=None):
    return probe_folder(folder, load_recipe("svd", small), texts or {}, "cpu", lambda what, done, total: None)


@pytest.fixture(scope="module")
def low_rank(make_model, tmp_path_factory, text):
    """A model whose experts are of rank 16 and have one input space."""
    import shutil

    folder = tmp_path_factory.mktemp("low") / "model"
    shutil.copytree(make_model("mixtral"), folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    shared = {size: torch.randn(16, size, generator=generator) / size**0.5 for size in (64, 96)}
    for name, weight in tensors.items():
        if "experts" in name:
            left = torch.randn(weight.shape[0], 16, generator=generator) / 4
            tensors[name] = left @ shared[weight.shape[1]]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_model_of_low_rank_bears_truncation_and_a_random_one_does_not(low_rank, make_model, small):
    low, random = look(low_rank, small), look(make_model("mixtral"), small)
    for found in (low, random):
        assert list(found.removed) == list(RATIOS)
        assert all(abs(found.removed[ratio] - ratio) < 0.03 for ratio in RATIOS)
    # 16 of the ranks hold all there is: at 40 % removed nothing is lost.
    # (What truncation does to the loss of a model that was never trained may have either sign.)
    assert abs(low.rehearsal["calibration"][0.4]) < 1e-4 < abs(random.rehearsal["calibration"][0.4])
    gate = next(iter(low.layers.values()))["projections"]["gate"]
    assert gate["effective_rank"]["weights"] < 17 < gate["effective_rank"]["random"]
    assert "Up to" in verdict(low)[0]
    assert verdict(random)[3].startswith("Experts share few input directions")


def test_one_layer_at_a_time_costs_what_that_layer_of_the_compressed_model_costs(make_model, small, tmp_path):
    folder = make_model("mixtral")
    run = Run(load_recipe("svd-llm", [*small, "svd.ratio=0.5", "evaluate.perplexity=[]"]), folder, tmp_path)
    [made] = run.run()
    asked = load_recipe("svd", small), {}, "cpu", lambda what, done, total: None
    found = probe_folder(folder, *asked, alone=[0.5]).alone["calibration"][0.5]

    def loss(model):
        with torch.no_grad():
            return float(model(input_ids=run.windows, labels=run.windows).loss)

    original, compressed = load(folder), load(made)
    before = loss(original)
    for index, rise in found.items():
        own = original.model.layers[index].mlp
        kept, own.experts = own.experts, compressed.model.layers[index].mlp.experts
        assert rise == pytest.approx(loss(original) - before, abs=2e-4), index
        own.experts = kept
    assert list(found) == [0, 1] and all(abs(rise) > 1e-3 for rise in found.values())


def test_the_verb_writes_figures_and_plots(make_model, small, tmp_path, text):
    arguments = [
        "probe",
        str(make_model("qwen2_moe")),
        *small,
        "--text",
        f"words={text}",
        "--out",
        str(tmp_path),
        "--alone",
        "0.5",
    ]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    content = json.loads((tmp_path / "probe.json").read_text())
    assert set(content["rehearsal"]) == {"calibration", "words"} and len(content["verdict"]) == 6
    assert all(math.isfinite(v) for costs in content["rehearsal"].values() for v in costs.values())
    assert {p.name for p in tmp_path.glob("*.png")} == {"spectra.png", "experts.png", "costs.png", "layers.png"}
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0 and "rehearsed" in shown.output and "sensitivity" in shown.output
    assert json.loads((tmp_path / "probe.json").read_text()) == content


def test_the_rehearsal_is_what_the_stage_then_does(make_model, small, tmp_path, text):
    """Loss of the checkpoint that `svd` writes, on the same tokens."""
    folder, overrides = make_model("mixtral"), [*small, "svd.ratio=0.4"]
    run = Run(load_recipe("svd", overrides), folder, tmp_path / "out")
    (checkpoint,) = run.run()
    models = (load(f, torch.float32) for f in (folder, checkpoint))
    before, after = (perplexity(in_memory(model), run.windows).nll for model in models)
    rehearsed = look(folder, small).rehearsal["calibration"][0.4]
    assert rehearsed == pytest.approx(after - before, rel=0.02)
    assert abs(rehearsed) > 1e-3  # of either sign: the model was never trained


def test_a_dense_model_is_refused(make_model, small, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((make_model("mixtral") / name).read_bytes())
    with pytest.raises(ModelError, match="no experts that text reaches"):
        look(tmp_path, small)
