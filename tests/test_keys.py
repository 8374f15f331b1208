"""A result is kept under a key that holds all its inputs: a change of any of them makes another key. The list is the
table in docs/design.md."""

import json
import shutil

import pytest
import torch
import transformers

from moesvd_quant.calibration.store import Statistics, fingerprint
from moesvd_quant.calibration.written import written_path
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.run.run import Run

WINDOWS = torch.randint(1, 250, (4, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(make_model, tmp_path):
    return shutil.copytree(make_model("mixtral"), tmp_path / "model")


def edit(file, **more):
    file.write_text(json.dumps(json.loads(file.read_text()) | more))


OF_STATISTICS = {
    "weights": lambda at: shutil.copy(at["other"] / "model.safetensors", at["model"]),
    "config": lambda at: edit(at["model"] / "config.json", rms_norm_eps=1e-3),
    "windows": lambda at: at.update(windows=WINDOWS.flip(0)),
    "shared experts": lambda at: at.update(shared=True),
    "threads": lambda at: at["patch"].setattr(torch, "get_num_threads", lambda: 77),
    "torch": lambda at: at["patch"].setattr(torch, "__version__", "0.0"),
    "transformers": lambda at: at["patch"].setattr(transformers, "__version__", "0.0"),
    "the walk": lambda at: at["patch"].setattr("moesvd_quant.calibration.store.WALK_VERSION", 0),
    "device": lambda at: at.update(device="cuda"),
}


@pytest.mark.parametrize("change", OF_STATISTICS)
def test_statistics(change, model, make_model, tmp_path, monkeypatch):
    at = {"model": model, "other": make_model("mixtral", seed=1), "patch": monkeypatch, "windows": WINDOWS}

    def key() -> str:
        known = Statistics(model, fingerprint(model), at["windows"], at.get("device", "cpu"), root=tmp_path / "store",
                           shared=at.get("shared", False))  # fmt: skip
        return known.key

    before = key()
    assert key() == before
    OF_STATISTICS[change](at)
    assert key() != before


OF_TEXT = {
    "weights": OF_STATISTICS["weights"],
    "tokenizer": lambda at: edit(at["model"] / "tokenizer_config.json", added="x"),
    "template": lambda at: (at["model"] / "chat_template.jinja").write_text("x"),
    "shape": lambda at: at.update(shape=(4, 33)),
    "seed": lambda at: at.update(seed=1),
    "device": lambda at: at.update(device="cuda"),
    "rounds": lambda at: at["patch"].setattr("moesvd_quant.calibration.written.ROUNDS", 1),
    "threads": OF_STATISTICS["threads"],
    "torch": OF_STATISTICS["torch"],
}


@pytest.mark.parametrize("change", OF_TEXT)
def test_what_the_model_wrote(change, model, make_model, monkeypatch):
    at = {"model": model, "other": make_model("mixtral", seed=1), "patch": monkeypatch}

    def key():
        shape = at.get("shape", (4, 32))
        return written_path(model, fingerprint(model), shape, at.get("seed", 0), at.get("device", "cpu"))

    before = key()
    assert key() == before
    OF_TEXT[change](at)
    assert key() != before


def overrides(*more):
    return lambda at: at.update(more=more)


OF_A_STAGE = {
    "weights": OF_STATISTICS["weights"],
    "content of the calibration text": lambda at: at["words"].write_text(at["words"].read_text()[::-1]),
    "content of the training text": lambda at: at["training"].write_text(at["training"].read_text()[::-1]),
    "samples": overrides("calibration.samples=23"),
    "an option": overrides("svd.ratio=0.3"),
    "seed": overrides("seed=1"),
    "shared experts": overrides("experts=all"),
    "unused tensors": overrides("unused_tensors=leave_out"),
    "threads": OF_STATISTICS["threads"],
    "version": lambda at: at["patch"].setattr("moesvd_quant.run.key.version", lambda name: "0.0"),
}


@pytest.mark.parametrize("change", OF_A_STAGE)
def test_a_stage(change, model, make_model, text, tmp_path, monkeypatch):
    words, training = tmp_path / "words.txt", tmp_path / "training.txt"
    words.write_text(text.read_text())
    training.write_text(text.read_text().upper())
    at = {"model": model, "other": make_model("mixtral", seed=1), "patch": monkeypatch, "words": words, "more": (),
          "training": training}  # fmt: skip
    given = [f"calibration.dataset={words}", "calibration.samples=24", "calibration.length=64",
             "calibration.self_written=0.0", "evaluate.perplexity=[]", f"lora.dataset={training}", "lora.steps=2",
             "lora.validation=2"]  # fmt: skip

    def key() -> dict:
        return Run(load_recipe("svd-lora-gptq4", [*given, *at["more"]]), model, tmp_path / "out").key(1)

    before = key()
    assert key() == before
    OF_A_STAGE[change](at)
    assert key() != before


@pytest.mark.parametrize("more", [["budget=2.5bpw"], ["limits.keep=['*.down']"], ["gptq.group_size=64"]])
def test_a_budget_counts_what_later_stages_do(more, model, tmp_path, small):
    given = [*small, "budget=2.3bpw"]
    before, after = (Run(load_recipe("fit", [*given, *also]), model, tmp_path / "out").key(0) for also in ([], more))
    assert before != after
