"""What other software reads of ours: the same function, by transformers alone and by GPTQModel."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import moesvd_quant
from moesvd_quant.export.export import export_checkpoint
from moesvd_quant.model.folder import ModelError
from moesvd_quant.recipe.recipe import load_recipe
from moesvd_quant.run.run import Run

IDS = torch.randint(1, 250, (2, 40), generator=torch.Generator().manual_seed(5))

# In a process of its own: GPTQModel unfuses the experts of every model class it touches.
GPTQMODEL = """
import sys, torch
from gptqmodel import BACKEND, GPTQModel
model = GPTQModel.load(sys.argv[1], device="cpu", dtype=torch.float16, backend=BACKEND.GPTQ_TORCH)
kinds = sum(type(m).__name__ == "TorchLinear" for m in model.model.modules())
with torch.no_grad():
    torch.save((model.model(torch.load(sys.argv[2])).logits.float(), kinds), sys.argv[3])
"""


def compress(folder, out, small, recipe="gptq4", *overrides):
    return Run(load_recipe(recipe, [*small, *overrides]), folder, out).run()[-1]


def logits(model):
    with torch.no_grad():
        return model(IDS).logits.float()


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss", "deepseek_v2"])
@pytest.mark.parametrize("recipe", ["svd-gptq3", "svd"])
def test_dense_is_a_plain_model_with_the_same_logits(architecture, recipe, make_model, tmp_path, small):
    checkpoint = compress(make_model(architecture), tmp_path / "run", small, recipe)
    export_checkpoint(checkpoint, tmp_path / "dense", "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert config["model_type"] == architecture and "moesvd" not in config and "auto_map" not in config
    assert not (tmp_path / "dense" / "modeling_moesvd.py").exists()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert "Moesvd" not in type(plain).__name__
    assert torch.allclose(logits(plain), logits(moesvd_quant.load(checkpoint)), atol=2e-4)


@pytest.mark.parametrize("architecture,bits", [("mixtral", 4), pytest.param("qwen2_moe", 3, marks=pytest.mark.slow)])
def test_gptqmodel_reads_the_standard_form_with_the_same_logits(architecture, bits, make_model, tmp_path, small):
    folder = make_model(architecture, torch.float16)
    checkpoint = compress(folder, tmp_path / "run", small, "gptq4", "gptq.sym=true", f"gptq.bits={bits}")
    export_checkpoint(checkpoint, tmp_path / "gptq", "gptq")
    torch.save(IDS, tmp_path / "ids.pt")
    command = [sys.executable, "-c", GPTQMODEL, tmp_path / "gptq", tmp_path / "ids.pt", tmp_path / "out.pt"]
    environment = os.environ | {"GPTQMODEL_DISABLE_PACK_EXT": "1", "GPTQMODEL_CPU_WORKERS": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    got, kinds = torch.load(tmp_path / "out.pt")
    expected = logits(moesvd_quant.load(checkpoint, dtype=torch.float32))
    original = logits(moesvd_quant.load(folder, dtype=torch.float32))
    assert kinds == (32 if architecture == "mixtral" else 50)  # attention and every expert matrix
    # Token by token: in fp16 a router near a tie may choose another expert, in a few of 80 tokens at most.
    apart, cost = (((other - expected).norm(dim=-1) / expected.norm(dim=-1)).flatten() for other in (got, original))
    assert apart.median() < 0.005 and (apart < 0.01).float().mean() > 0.9
    assert apart.median() < 0.1 * cost.median()


@pytest.mark.parametrize(
    "recipe,to,message",
    [
        ("svd-gptq4", "gptq", r"is factorized or not quantized; export it --to dense"),
        ("gptq4", "onnx", "neither dense nor gptq"),
    ],
)
def test_what_cannot_be_exported(make_model, tmp_path, small, recipe, to, message):
    checkpoint = compress(make_model("mixtral"), tmp_path / "run", small, recipe)
    with pytest.raises(ModelError, match=message):
        export_checkpoint(checkpoint, tmp_path / "out", to)


def test_an_original_or_a_full_folder_is_refused(make_model, tmp_path):
    with pytest.raises(ModelError, match="nothing to export"):
        export_checkpoint(make_model("mixtral"), tmp_path / "out", "dense")
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ModelError, match="not empty"):
        export_checkpoint(make_model("mixtral"), tmp_path, "dense")
