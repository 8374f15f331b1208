"""A checkpoint opens by three routes with the same bits, survives saving, generates, and otherwise raises."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.dynamic_module_utils import get_imports

import moesvd_quant
from expert_runs import job
from moesvd_quant.model.folder import ModelError
from moesvd_quant.model.load import _say_slow, without_kernel
from moesvd_quant.model.stream import StreamedModel
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.run.run import Run
from moesvd_quant.runtime import modeling_moesvd
from stranger import logits_without_package

HOME = Path(modeling_moesvd.__file__).parent
IDS = torch.randint(1, 250, (2, 40), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module", params=["mixtral", "qwen2_moe", "gpt_oss", "tied"])
def checkpoint(request, make_model, tmp_path_factory, text):
    overrides = [f"calibration.dataset={text}", "calibration.samples=24", "calibration.length=64"]
    tied = dict(tie_word_embeddings=True) if request.param == "tied" else {}
    folder = make_model("mixtral" if tied else request.param, torch.bfloat16, **tied)
    return Run(load_recipe("svd-gptq3", overrides), folder, tmp_path_factory.mktemp("out")).run()[-1]


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_all_routes_give_the_same_bits(checkpoint, tmp_path):
    expected = logits(moesvd_quant.load(checkpoint))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(checkpoint)), expected)
    streamed = torch.cat(list(StreamedModel(checkpoint).logits(IDS)))
    assert torch.allclose(streamed, expected, atol=2e-2)  # bfloat16, another order of sums


def test_saved_again_it_is_the_same(checkpoint, tmp_path):
    model = moesvd_quant.load(checkpoint)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(moesvd_quant.load(tmp_path)), logits(model))
    digests = json.loads((tmp_path / "moesvd.json").read_text())["digests"]
    assert set(digests) == {p.name for p in tmp_path.glob("*.safetensors")}


def test_no_cast_reaches_packed_weights(checkpoint):
    a, b = moesvd_quant.load(checkpoint), moesvd_quant.load(checkpoint, dtype=torch.float32)
    for (name, p), (_, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        if not p.is_floating_point():
            assert torch.equal(p, q), name
    assert (logits(a).float() - logits(b)).abs().mean() < 0.05


def test_it_generates(checkpoint):
    model = moesvd_quant.load(checkpoint, dtype=torch.float32)
    out = model.generate(IDS[:, :8], max_new_tokens=5, do_sample=False, attention_mask=torch.ones(2, 8))
    with torch.no_grad():
        tokens = IDS[:, :8]
        for _ in range(5):  # greedy without a cache
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(out[:, : tokens.shape[1]], tokens) or 0 in out  # an end token stops generate


def test_a_lost_or_foreign_tensor_raises(checkpoint, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    (copy / "moesvd.json").unlink()  # whoever edits weights has no digests
    file = copy / "model-layer-00001.safetensors"
    tensors = load_file(file)
    lost = next(name for name in tensors if "experts" in name and name.endswith("codes"))
    save_file({k: v for k, v in tensors.items() if k != lost}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError):
        moesvd_quant.load(copy)


@pytest.mark.parametrize("checkpoint", ["mixtral"], indirect=True)
def test_without_the_package_it_needs_trust_and_then_gives_the_same_bits(checkpoint, tmp_path):
    refused, found = logits_without_package(checkpoint, IDS, tmp_path, trust=False)
    assert refused.returncode and "trust_remote_code" in refused.stderr and found is None
    done, found = logits_without_package(checkpoint, IDS, tmp_path)
    assert done.returncode == 0, done.stderr
    expected = logits(moesvd_quant.load(checkpoint))
    assert torch.equal(found, expected)


def test_what_a_checkpoint_ships_demands_no_more_than_it_needs():
    """transformers refuses a checkpoint where anything is missing that its files import outside of `try`."""
    demanded = {name for file in modeling_moesvd.SHIPPED for name in get_imports(HOME / file)}
    assert demanded - set(sys.stdlib_module_names) == {"torch", "transformers", "numpy", "huggingface_hub"}


@pytest.mark.parametrize(
    ("stages", "slow"),
    [("{sparsify: {method: wanda, pattern: '2:4'}}", ["sparse"]), ("{gptq: {bits: 3, group_size: 32}}", [])],
    ids=["sparse", "gptq"],
)
def test_formats_without_a_kernel_are_named_once(stages, slow, make_model, tmp_path, small, caplog):
    [made] = job(make_model("mixtral"), tmp_path, small, stages).run()
    _say_slow.cache_clear()
    assert without_kernel(moesvd_quant.load(made)) == without_kernel(moesvd_quant.load(made)) == slow
    said = [
        record.getMessage() for record in caplog.records if "no kernel on this machine (cpu)" in record.getMessage()
    ]
    assert len(said) == len(slow) and all("stored as sparse" in message for message in said)
