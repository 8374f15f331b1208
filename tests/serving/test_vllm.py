"""vLLM serves our checkpoints: its greedy tokens are those of transformers' `generate` on what `load` opens."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

import moesvd_quant
from moesvd_quant.recipe.recipe import load_recipe
from moesvd_quant.run.run import Run

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
PROMPTS = [[5, 17, 33, 4, 99, 120], [7, 8, 9, 10, 200, 201, 13, 14]]
COUNT = 16

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-vllm: make venv-vllm"),
]
# vLLM's attention on a CPU takes heads of 32 and more.
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}
MORE = {"mixtral": {"head_dim": 32}, "qwen2_moe": {}, "qwen3_moe": {"head_dim": 32}}
STAGES = {
    "svd": "{svd: {ratio: 0.3}}",
    "svd+gptq4": "{svd: {ratio: 0.3}}, {gptq: {bits: 4}}",
    "trellis": "{gptq: {bits: 2, format: trellis}}",
}


def in_vllm(folders: list[Path], **more) -> dict[Path, list[list[int]] | str]:
    job = {"folders": list(map(str, folders)), "prompts": PROMPTS, "count": COUNT, "more": more}
    command = [PYTHON, Path(__file__).with_name("vllm_tokens.py"), json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": ""})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return {Path(folder): tokens for folder, tokens in found.items()}


def ours(folder: Path) -> list[list[int]]:
    model = moesvd_quant.load(folder, dtype=torch.float32)
    made = []
    for ids in PROMPTS:
        whole = model.generate(
            torch.tensor([ids]), max_new_tokens=COUNT, min_new_tokens=COUNT, do_sample=False, pad_token_id=0
        )
        made.append(whole[0, len(ids) :].tolist())
    return made


@pytest.fixture(scope="module")
def checkpoint(make_model, tmp_path_factory, text):
    """checkpoint(architecture, stages) -> folder of the last of these stages."""

    def make(architecture: str, stages: str, **recipe) -> Path:
        out = tmp_path_factory.mktemp("served")
        (out / "mine.yaml").write_text(f"stages: [{stages}]")
        small = [f"calibration.dataset={text}", "calibration.samples=8", "calibration.length=32"]
        small += ["calibration.self_written=0.0", "evaluate.perplexity=[]", *(f"{k}={v}" for k, v in recipe.items())]
        folder = make_model(architecture, **HEADS, **MORE[architecture])
        return Run(load_recipe(out / "mine.yaml", small), folder, out / "out").run()[-1]

    return make


@pytest.mark.parametrize("architecture", MORE)
def test_greedy_tokens_are_ours(architecture, checkpoint):
    folders = [checkpoint(architecture, stages) for stages in STAGES.values()]
    found = in_vllm(folders, enforce_eager=True)
    for folder in folders:
        assert found[folder] == ours(folder)
