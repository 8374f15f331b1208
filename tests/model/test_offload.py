"""Checkpoints that do not fit: spread over memory and disk by accelerate, with the same logits."""

import pytest
import torch

import moesvd_quant
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.run.run import Run
from moesvd_quant.runtime.factorized_experts import FactorizedExperts

IDS = torch.randint(1, 250, (2, 40), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss"])
def checkpoint(request, make_model, tmp_path_factory, text):
    overrides = [f"calibration.dataset={text}", "calibration.samples=24", "calibration.length=64"]
    folder = make_model(request.param, torch.bfloat16)
    return Run(load_recipe("svd-gptq3", overrides), folder, tmp_path_factory.mktemp("out")).run()[-1]


@torch.no_grad()
def test_half_of_it_on_disk_gives_the_same_logits(checkpoint, tmp_path):
    expected = moesvd_quant.load(checkpoint)(IDS).logits
    size = sum(p.numel() * p.element_size() for p in moesvd_quant.load(checkpoint).parameters())
    model = moesvd_quant.load(
        checkpoint, device_map="auto", max_memory={"cpu": int(0.7 * size)}, offload_folder=str(tmp_path)
    )
    places = set(map(str, model.hf_device_map.values()))
    assert "disk" in places and "cpu" in places
    assert not [name for name in model.hf_device_map if ".experts." in name]  # an experts module is not torn apart
    away = [m for m in model.modules() if isinstance(m, FactorizedExperts) and next(m.parameters()).is_meta]
    assert away  # an experts module, packed integers and all, is on disk
    assert torch.equal(model(IDS).logits, expected)
