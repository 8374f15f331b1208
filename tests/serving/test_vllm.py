"""vLLM serves our checkpoints: its greedy tokens are those of transformers' `generate` on what `load` opens."""

import json
import os
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch

import moesvd_quant
from architectures import tiny_config
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.run.run import Run
from moesvd_quant.runtime.modeling_moesvd import native_class
from moesvd_quant.serving.vllm_plugin.names import SERVED
from tiny import enlarge, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
BIN = ROOT / ".venv-vllm" / "bin"
PROMPTS = [[5, 17, 33, 4, 99, 120], [7, 8, 9, 10, 200, 201, 13, 14]]
COUNT = 16
EAGER = {"enforce_eager": True}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not (BIN / "vllm").exists(), reason="no .venv-vllm: make venv-vllm"),
]
SVD = "{svd: {ratio: 0.3}}"
STAGES = {
    "svd": SVD,
    "svd+gptq4": f"{SVD}, {{gptq: {{bits: 4}}}}",
    "trellis": "{gptq: {bits: 2, format: trellis}}",
}


def base_model(architecture: str, folder: Path) -> Path:
    """A tiny model whose heads have the 32 elements that vLLM's attention on a CPU takes at least."""
    config = tiny_config(architecture)
    config.num_attention_heads = config.num_key_value_heads = config.hidden_size // 32
    config.head_dim = 32  # vLLM reads it of GLM-4.5, whose config has it, and not its class
    torch.manual_seed(0)
    model = native_class(type(config))._from_config(config).eval()
    enlarge(model)
    model.float().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, text):
    """checkpoint(architecture, stages, head of the recipe) -> folder of the last of these stages; made once."""
    models: dict[str, Path] = {}
    made: dict[tuple, Path] = {}

    def make(architecture: str, stages: str, head: str = "") -> Path:
        if architecture not in models:
            models[architecture] = base_model(architecture, tmp_path_factory.mktemp(architecture))
        if (architecture, stages, head) not in made:
            out = tmp_path_factory.mktemp("served")
            (out / "mine.yaml").write_text(f"{head}\nstages: [{stages}]")
            small = [f"calibration.dataset={text}", "calibration.samples=8", "calibration.length=32"]
            small += ["calibration.self_written=0.0", "evaluate.perplexity=[]"]
            run = Run(load_recipe(out / "mine.yaml", small), models[architecture], out / "out")
            made[architecture, stages, head] = run.run()[-1]
        return made[architecture, stages, head]

    return make


def in_vllm(runs: list[tuple[Path, dict]], **environment) -> list[dict]:
    """For each (folder, arguments of vLLM): {"tokens": of each prompt} or {"refused": why}."""
    job = {"runs": [(str(folder), arguments) for folder, arguments in runs], "prompts": PROMPTS, "count": COUNT}
    command = [BIN / "python", Path(__file__).with_name("vllm_tokens.py"), json.dumps(job)]
    given = os.environ | {"PYTHONPATH": ""} | environment
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=given, stdin=subprocess.DEVNULL, start_new_session=True
    )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
    assert done.returncode == 0 and len(found) == len(runs), done.stdout[-2000:] + done.stderr[-4000:]
    return found


def ours(folder: Path, count: int = COUNT) -> list[list[int]]:
    model = moesvd_quant.load(folder, dtype=torch.float32)
    long = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    return [model.generate(torch.tensor([ids]), **long)[0, len(ids) :].tolist() for ids in PROMPTS]


@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_greedy_tokens_are_ours_in_every_format(architecture, checkpoint):
    folders = [checkpoint(architecture, stages) for stages in STAGES.values()]
    found = in_vllm([(folder, EAGER) for folder in folders])
    assert found == [{"tokens": ours(folder)} for folder in folders]


def test_greedy_tokens_are_ours_with_packed_shared_experts_and_mixed_widths(checkpoint):
    shared = checkpoint("qwen2_moe", STAGES["svd+gptq4"], "experts: all")
    mixed = checkpoint("mixtral", "svd, {gptq: {format: best}}", "budget: 3bpw")
    assert in_vllm([(shared, EAGER), (mixed, EAGER)]) == [{"tokens": ours(shared)}, {"tokens": ours(mixed)}]


def test_greedy_tokens_are_ours_where_experts_were_left_out_and_the_output_head_is_packed(checkpoint):
    pruned = checkpoint("qwen3_moe", "{prune: {ratio: 0.5}}, {gptq: {bits: 4, lm_head: true}}")
    assert in_vllm([(pruned, EAGER)]) == [{"tokens": ours(pruned)}]


@pytest.mark.parametrize("architecture", [name for name in SERVED if "qwen" not in name and name != "mixtral"])
def test_greedy_tokens_are_ours_in_other_architectures(architecture, checkpoint):
    folder = checkpoint(architecture, STAGES["svd+gptq4"])
    assert in_vllm([(folder, EAGER)]) == [{"tokens": ours(folder)}]


def test_compiled_by_torch_it_gives_the_same(checkpoint):
    folder = checkpoint("mixtral", STAGES["svd+gptq4"])
    assert in_vllm([(folder, {"enforce_eager": False})]) == [{"tokens": ours(folder)}]


def test_two_processes_share_the_experts(checkpoint):
    folder = checkpoint("mixtral", SVD)
    two = EAGER | {"tensor_parallel_size": 2}
    alone = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    assert in_vllm([(folder, two)], **alone) == [{"tokens": ours(folder)}]


def test_what_cannot_be_served_is_refused_with_the_reason(checkpoint):
    packed, unknown = checkpoint("mixtral", STAGES["svd+gptq4"]), checkpoint("deepseek_v2", SVD)
    expected = {
        "packed cannot be split over processes": (packed, {"tensor_parallel_size": 2}),
        "--enable-expert-parallel: experts of ours share factors": (packed, {"enable_expert_parallel": True}),
        "--pipeline-parallel-size 2: not supported": (packed, {"pipeline_parallel_size": 2}),
        "--enable-lora: adapters do not fit": (packed, {"enable_lora": True}),
        "our checkpoints are safetensors": (packed, {"load_format": "dummy"}),
        "deepseek_v2 is none of mixtral": (unknown, {}),
    }
    for reason, found in zip(expected, in_vllm(list(expected.values()))):
        assert reason in found["refused"]


def test_the_command_serves_by_vllm(checkpoint):
    from openai import APIConnectionError, OpenAI

    folder = checkpoint("mixtral", STAGES["svd+gptq4"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = os.environ | {"PYTHONPATH": "", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen(
        [BIN / "moesvd", "serve", folder, "--port", str(port)], env=given, cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    try:
        while True:
            try:
                assert [model.id for model in client.models.list()] == [folder.name]
                break
            except APIConnectionError:
                assert server.poll() is None, server.communicate()[0]
                time.sleep(2)
        asked = {"model": folder.name, "temperature": 0, "max_tokens": 8, "extra_body": {"return_token_ids": True}}
        for ids, expected in zip(PROMPTS, ours(folder, 8)):
            answer = client.completions.create(prompt=ids, **asked).choices[0]
            assert answer.token_ids[:8] == expected[: len(answer.token_ids)]
        streamed = client.completions.create(prompt=PROMPTS[0], stream=True, **asked)
        assert "".join(piece.choices[0].text for piece in streamed if piece.choices)
    finally:
        server.terminate()
        server.wait(60)
