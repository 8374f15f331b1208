"""What is promised of trained models, measured: quality of GPTQ and of svd-gptq3 against it, at all bytes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from moesvd_quant.calibration.text import load_documents, token_windows
from moesvd_quant.comparison.bench import compare
from moesvd_quant.comparison.demo import CALIBRATION, TEXTS
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.reference import path as reference_path
from moesvd_quant.run.run import Run

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module", params=["reference", "shared"])
def model(request) -> Path:
    return reference_path() if request.param == "reference" else request.getfixturevalue("shared") / "models/mixtral-6m"


def test_gptq_and_svd_gptq3_keep_their_promises(model, tmp_path):
    (tmp_path / "rtn3.yaml").write_text("stages: [{gptq: {bits: 3, rtn: true}}]")
    recipes = ["gptq4", "gptq3", "gptq2", "svd-gptq3", tmp_path / "rtn3.yaml"]
    records, _ = compare(model, recipes, tmp_path / "out", TEXTS, 256, CALIBRATION)
    found = {r["name"]: (r["perplexity"]["demo"]["ppl"], r["memory"]["disk_bytes"], r["accounting"]) for r in records}
    original = found["original"][0]
    assert found["gptq4"][0] <= 1.015 * original
    assert found["gptq4"][2]["bits_per_expert_weight"] <= 4.6
    assert found["gptq3"][0] - original <= 0.5 * (found["rtn3"][0] - original)
    assert found["svd40-gptq3"][0] <= found["gptq2"][0]
    assert found["svd40-gptq3"][1] < found["gptq2"][1]


def test_equal_to_gptqmodels_own_result(model, tmp_path):
    run = Run(
        load_recipe("gptq4", [*CALIBRATION, "evaluate.perplexity=[]", "gptq.group_size=64"]), model, tmp_path / "o"
    )
    from moesvd_quant.evaluation.inputs import EvalSpec
    from moesvd_quant.evaluation.record import evaluate

    ours = evaluate(run.run()[-1], EvalSpec({"demo": "demo"}, length=256))["perplexity"]["demo"]["ppl"]
    torch.save(run.windows, tmp_path / "windows.pt")
    windows = token_windows(load_documents("demo", "test"), AutoTokenizer.from_pretrained(model), 256)
    torch.save(windows, tmp_path / "test.pt")
    script = Path(__file__).with_name("gptqmodel_peer.py")
    command = [
        sys.executable,
        script,
        model,
        tmp_path / "windows.pt",
        tmp_path / "test.pt",
        "4",
        "64",
        tmp_path / "peer",
    ]
    environment = os.environ | {"GPTQMODEL_CPU_WORKERS": "2", "GPTQMODEL_DISABLE_PACK_EXT": "1"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    (result,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    packed, theirs = int(result.split()[1]), float(result.split()[2])
    assert packed == 4 * (4 + 3 * 8)  # attention and every expert matrix of four layers
    print(f"ours {ours:.4f}, GPTQModel {theirs:.4f}")
    assert ours <= 1.005 * theirs
