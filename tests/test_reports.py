"""Difficulties that users of such tools report in public, each with what has to happen instead."""

import ast
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from moesvd_quant.calibration.rows import TextError
from moesvd_quant.cli.models import record_places
from moesvd_quant.errors import ModelError, UsageError
from moesvd_quant.evaluation.inputs import EvalSpec
from moesvd_quant.evaluation.record import evaluate
from moesvd_quant.memory.files import require_writable
from moesvd_quant.model.carried import carried_files, is_carried, wanted_from_hub, weights_from_hub
from moesvd_quant.model.named import resolve_model
from moesvd_quant.model.tokenizer import load_tokenizer
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.run.run import Run

PACKAGE = Path(__file__).parent.parent / "moesvd_quant"
CLI = [sys.executable, "-m", "moesvd_quant.cli"]


@pytest.fixture
def model(make_model, tmp_path) -> Path:
    return shutil.copytree(make_model("mixtral", torch.bfloat16), tmp_path / "model")


def test_what_is_carried_follows_the_source(model, small, tmp_path):
    def run() -> Path:
        return Run(load_recipe("gptq4", small), model, tmp_path / "out").run()[-1]

    checkpoint = run()
    config = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": 7}))
    (model / "chat_template.jinja").write_text("{{ messages }}")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (model / "LICENSE.md").write_text("MIT")
    (model / "README.md").write_text("---\nlicense: mit\n---\n")
    weights = (checkpoint / "model-layer-00000.safetensors").stat().st_mtime_ns
    assert run() == checkpoint and (checkpoint / "model-layer-00000.safetensors").stat().st_mtime_ns == weights
    assert json.loads((checkpoint / "generation_config.json").read_text())["eos_token_id"] == 7
    names = ["chat_template.jinja", "additional_chat_templates/tools.jinja", "LICENSE.md"]
    assert all((checkpoint / name).read_bytes() == (model / name).read_bytes() for name in names)
    assert "license: mit" in (checkpoint / "README.md").read_text()
    (model / "chat_template.jinja").unlink()
    assert not (run() / "chat_template.jinja").exists()


def test_one_rule_for_what_goes_with_a_model(tmp_path):
    carried = [
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
        "merges.txt", "tokenizer.model", "sentencepiece.bpe.model", "tiktoken.model", "qwen.tiktoken", "tekken.json",
        "chat_template.jinja", "chat_template.json", "additional_chat_templates/rag.jinja", "generation_config.json",
        "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "LICENSE", "LICENSE.txt",
        "LICENCE", "NOTICE", "USE_POLICY.md",
    ]  # fmt: skip
    left = [
        "config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
        "pytorch_model.bin.index.json", "moesvd.json", "eval.json", "speed.json", "run.json", "params.json",
        "modeling_x.py", "tokenization_x.py", "adapter_config.json", "original/model.safetensors", "consolidated.pth",
        "quantize_config.json", "README.md", ".gitattributes", "figures/plot.png",
    ]  # fmt: skip
    assert [name for name in carried if not is_carried(name)] == []
    assert [name for name in left if is_carried(name)] == []
    for name in carried + left:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert carried_files(tmp_path) == sorted(carried)


def test_weights_are_fetched_once(tmp_path):
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    names = [*shards, "model.safetensors.index.json", "config.json", "tokenizer.json", "original/model.safetensors",
             "consolidated.safetensors", "metal/model.bin", "modeling.py", "README.md", "LICENSE"]  # fmt: skip
    assert set(wanted_from_hub(names)) == set(names) - {*shards} - {*names[5:9]}
    index = {"weight_map": {"a": shards[0], "b": shards[1], "c": shards[0]}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weights_from_hub(tmp_path, names) == shards
    assert weights_from_hub(tmp_path / "none", ["model.safetensors", "consolidated.safetensors"]) == [
        "model.safetensors"
    ]


def test_a_token_without_an_embedding_is_named(model, small, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"<|new{i}|>" for i in range(320 - len(tokenizer) + 1)])
    tokenizer.save_pretrained(model)
    last = tokenizer.convert_ids_to_tokens(320)
    file = tmp_path / "talk.txt"
    file.write_text(f"Some words {last} and more words. " * 400)
    message = rf"the text has token 320 \('{re.escape(last)}'\), and the embedding has 320 rows"
    with pytest.raises(TextError, match=message):
        Run(load_recipe("gptq4", [*small, f"calibration.dataset={file}"]), model, tmp_path / "out")
    for protocol in ("gptq", "lm-eval"):
        with pytest.raises(TextError, match=message):
            evaluate(model, EvalSpec({"talk": str(file)}, (protocol,), length=64))


def test_lm_eval_needs_a_token_that_begins_or_ends_texts(model, text):
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (model / "special_tokens_map.json").unlink(missing_ok=True)
    wanted = EvalSpec({"words": str(text)}, ("gptq", "lm-eval"), length=64)
    with pytest.raises(UsageError, match=r"neither bos_token nor eos_token.*tokenizer_config\.json"):
        evaluate(model, wanted)


def test_a_tokenizer_that_needs_code_is_named_with_the_way_out(model):
    (model / "tokenizer.json").unlink()
    (model / "tiktoken.model").write_text("x")
    (model / "tokenization_strange.py").write_text("open('RAN', 'w')")
    config = {"tokenizer_class": "Strange", "auto_map": {"AutoTokenizer": ["tokenization_strange.Strange", None]}}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"{model}: its tokenizer cannot be read .*needs a tokenizer.json"):
        load_tokenizer(model)


def test_code_of_a_model_is_never_asked_about(model, tmp_path):
    """In a terminal, where transformers would ask, and with somebody who says yes to all."""
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "unheard", "auto_map": {"AutoConfig": "configuration_x.C"}}
    (model / "config.json").write_text(json.dumps(config))
    marker = tmp_path / "RAN"
    (model / "configuration_x.py").write_text(
        f"open({str(marker)!r}, 'w')\nfrom transformers import PretrainedConfig\n"
        "class C(PretrainedConfig):\n    model_type = 'unheard'\n"
    )
    ours, theirs = pty.openpty()
    os.write(ours, b"y\ny\ny\n")
    done = subprocess.run(
        [*CLI, "plan", "gptq4", "--model", str(model)], stdin=theirs, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1 and not marker.exists()
    assert "code that comes with a model is not run" in done.stderr and "[y/N]" not in done.stdout + done.stderr


def test_no_call_leaves_remote_code_open():
    """What reads a folder of the user's says trust_remote_code=False; runtime/ follows its caller, as transformers."""
    open_calls = []
    for file in PACKAGE.rglob("*.py"):
        if file.parent.name in ("runtime", "reference"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".from_pretrained"):
                closed = any(k.arg == "trust_remote_code" and ast.unparse(k.value) == "False" for k in node.keywords)
                if not closed and "GenerationConfig" not in ast.unparse(node.func):
                    open_calls.append(f"{file.name}:{node.lineno}")
    assert open_calls == []


@pytest.mark.slow
def test_the_record_of_a_name_does_not_hide_the_model(model, text, tmp_path):
    snapshot = tmp_path / "hf" / "hub" / "models--acme--tiny" / "snapshots" / ("0" * 40)
    shutil.copytree(model, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    (tmp_path / "here").mkdir()
    cache = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_CACHE": str(tmp_path / "hf" / "hub")}
    environment = os.environ | cache | {"HF_HUB_OFFLINE": "1"}
    command = [*CLI, "eval", "acme/tiny", "--text", str(text), "--length", "64", "--json"]
    run = lambda *more: subprocess.run(  # noqa: E731
        [*command, *more], cwd=tmp_path / "here", env=environment, capture_output=True, text=True, timeout=300
    )
    first = run()
    assert first.returncode == 0 and "no record is kept" in first.stderr, first.stderr
    assert list((tmp_path / "here").iterdir()) == [] and not (snapshot / "eval.json").exists()
    second = run("--out", "records")
    assert second.returncode == 0 and (tmp_path / "here" / "records" / "tiny" / "eval.json").is_file()
    assert json.loads(first.stdout)[0]["perplexity"] == json.loads(second.stdout)[0]["perplexity"]


def test_a_folder_of_records_is_no_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "acme" / "tiny").mkdir(parents=True)
    (tmp_path / "acme" / "tiny" / "eval.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="it cannot be had from the hub"):
        resolve_model("acme/tiny")


def test_records_of_two_models_do_not_share_a_place(tmp_path):
    places = record_places({"a/02-gptq": Path("a/02-gptq"), "b/02-gptq": Path("b/02-gptq")}, tmp_path)
    assert places == {"a/02-gptq": tmp_path / "a-02-gptq", "b/02-gptq": tmp_path / "b-02-gptq"}
    one = record_places({"a/02-gptq": Path("a/02-gptq")}, tmp_path)["a/02-gptq"]
    assert one == tmp_path / "02-gptq"
    one.mkdir()
    (one / "eval.json").write_text(json.dumps({"folder": str(Path("a/02-gptq").resolve())}))
    record_places({"a/02-gptq": Path("a/02-gptq")}, tmp_path)
    with pytest.raises(UsageError, match=r"02-gptq: holds the record of .*a/02-gptq"):
        record_places({"b/02-gptq": Path("b/02-gptq")}, tmp_path)


def test_a_folder_that_cannot_be_written_is_said_first(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file/x: cannot be written"):
        require_writable(tmp_path / "file" / "x")
    require_writable(tmp_path / "new" / "deep")
    assert not (tmp_path / "new").exists()
