"""Bad input: a clear error that says where and what to do, and nothing lost."""

import json
import os
import shutil
import subprocess

import pytest
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import moesvd_quant
from moesvd_quant.calibration.rows import TextError
from moesvd_quant.memory.files import WriteError, require_space, write_json
from moesvd_quant.model.folder import ModelError
from moesvd_quant.model.stream import StreamedModel
from moesvd_quant.planning.context import StageError
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.run.output import RunError
from moesvd_quant.run.run import Run
from moesvd_quant.runtime.modeling_moesvd import check_digests
from tiny import tiny_tokenizer


def run(recipe, folder, out, overrides):
    return Run(load_recipe(recipe, overrides), folder, out).run()


@pytest.fixture(scope="module")
def checkpoint(make_model, tmp_path_factory, text):
    overrides = [f"calibration.dataset={text}", "calibration.samples=24", "calibration.length=64"]
    return run("svd-gptq4", make_model("mixtral"), tmp_path_factory.mktemp("out"), overrides)[-1]


def break_file(checkpoint, tmp_path, change):
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    file = copy / "model-layer-00001.safetensors"
    content = bytearray(file.read_bytes())
    file.write_bytes(change(content))
    return copy


def flip(content):
    content[len(content) // 2] ^= 1
    return content


@pytest.mark.parametrize("change", [flip, lambda content: content[:-64], lambda content: content[:20]])
@pytest.mark.parametrize("use", [moesvd_quant.load, StreamedModel])
def test_a_damaged_checkpoint_is_named(checkpoint, tmp_path, change, use):
    copy = break_file(checkpoint, tmp_path, change)
    with pytest.raises(ValueError, match=r"model-layer-00001\.safetensors: damaged .*copy the checkpoint again"):
        use(copy)


def test_a_lost_shard_is_named(checkpoint, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    (copy / "model-outer.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-outer\.safetensors: missing; the checkpoint is incomplete"):
        moesvd_quant.load(copy)


def test_a_damaged_stage_stops_the_next_and_is_kept(make_model, tmp_path, small):
    (first,) = run("svd", make_model("mixtral"), tmp_path, [*small])
    file = first / "model-layer-00000.safetensors"
    file.write_bytes(flip(bytearray(file.read_bytes())))
    with pytest.raises(ValueError, match="damaged"):
        run("svd-gptq4", make_model("mixtral"), tmp_path, small)
    assert first.is_dir() and not (tmp_path / "02-gptq").exists()


def test_a_dense_model(tmp_path, small):
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(vocab_size=320, **shape)).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    for recipe in ("svd", "gptq4"):
        with pytest.raises(StageError, match="a dense model: no layer has experts"):
            run(recipe, tmp_path / "dense", tmp_path / "out", small)


def test_no_such_folder_and_no_model_in_it(tmp_path, small):
    with pytest.raises(ModelError, match=r"no config\.json"):
        run("svd", tmp_path / "nowhere", tmp_path / "out", small)


def test_nan_in_a_weight_before_anything_is_written(make_model, tmp_path, small):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(make_model("mixtral"))
    model.model.layers[1].mlp.experts.down_proj.data[2, 5, 7] = float("inf")
    model.save_pretrained(tmp_path / "bad")
    tiny_tokenizer().save_pretrained(tmp_path / "bad")
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.experts\.down_proj is not finite at \[2, 5, 7\]"):
        run("svd-gptq4", tmp_path / "bad", tmp_path / "out", small)
    assert not [p for p in (tmp_path / "out").iterdir() if p.is_dir()]


def test_a_group_size_that_does_not_divide_stops_before_the_svd(make_model, tmp_path, small):
    with pytest.raises(StageError, match=r"group_size 48 does not divide 64 input features; use auto"):
        run("svd-gptq4", make_model("mixtral"), tmp_path, [*small, "gptq.group_size=48"])
    assert not (tmp_path / "01-svd").exists()


def test_text_shorter_than_a_window(make_model, tmp_path, small):
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(TextError, match=r"short\.txt: \d+ tokens give 0 windows of 64; 24 are wanted"):
        run("svd", make_model("mixtral"), tmp_path / "out", [*small, f"calibration.dataset={tmp_path / 'short.txt'}"])


def test_windows_longer_than_the_model(make_model, tmp_path, small):
    with pytest.raises(ModelError, match=r"calibration\.length 512 exceeds the 256 positions"):
        run("svd", make_model("mixtral"), tmp_path / "out", [*small, "calibration.length=512"])


def test_a_ratio_that_leaves_no_rank(make_model, tmp_path, small):
    message = r"ratio 0\.999 cannot be had by decomposing some of 2 layers; the nearest that can: 0\.9"
    with pytest.raises(StageError, match=message):
        run("moe-svd-paper", make_model("mixtral"), tmp_path, [*small, "svd.ratio=0.999"])


def test_a_folder_of_the_users_is_not_overwritten(make_model, tmp_path, small):
    (tmp_path / "01-svd").mkdir()
    (tmp_path / "01-svd" / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match="exists and is no checkpoint of ours"):
        run("svd", make_model("mixtral"), tmp_path, small)
    assert (tmp_path / "01-svd" / "thesis.txt").read_text() == "years of work"


def test_too_little_room_is_said_before_the_work(make_model, tmp_path, small, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    full = usage._replace(free=2**20 + 1000)  # the disk of the output, not that of the cache
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full if tmp_path in [path, *path.parents] else usage)
    with pytest.raises(WriteError, match=r"GB are needed and .* GB are free; make room"):
        run("svd", make_model("mixtral"), tmp_path, small)
    with pytest.raises(WriteError):
        require_space(tmp_path, 10**9)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 400 kB; its size can be changed."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("may not mount a small disk here")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def test_a_disk_that_fills_up_leaves_no_half_file_and_the_run_goes_on(make_model, small_disk, small, monkeypatch):
    monkeypatch.setattr("moesvd_quant.run.run.require_space", lambda *_: None)  # someone else fills it meanwhile
    folder, out = make_model("mixtral"), small_disk / "out"
    with pytest.raises(WriteError, match="the disk is full; make room and run the same command again"):
        run("svd", folder, out, small)
    for file in out.rglob("*.safetensors"):
        load_file(file)
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    (checkpoint,) = run("svd", folder, out, small)
    check_digests(checkpoint)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_text_file_on_a_full_disk(tmp_path, monkeypatch):
    (tmp_path / "full").symlink_to("/dev/full")
    monkeypatch.setattr("moesvd_quant.memory.files._temporary", lambda path: tmp_path / "full")
    with pytest.raises(WriteError, match="the disk is full"):
        write_json(tmp_path / "a.json", {"x": "y" * 100_000})
    assert not (tmp_path / "a.json").exists()


DAMAGE = {
    "no JSON": lambda text: "{" + text,
    "cut short": lambda text: text[: len(text) // 2],
    "a list": lambda text: "[1, 2]",
    "not UTF-8": lambda text: b"\xff\xfe" + text.encode(),
    "empty": lambda text: "",
}


@pytest.mark.parametrize("use", [moesvd_quant.load, StreamedModel])
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["model.safetensors.index.json", "moesvd.json", "config.json"])
def test_a_damaged_json_file_is_named(checkpoint, tmp_path, name, damage, use):
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    content = DAMAGE[damage]((copy / name).read_text())
    (copy / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ModelError) as caught:
        use(copy)
    assert f"{copy / name}" in str(caught.value) and "copy" in str(caught.value).rpartition(";")[2]


EXPERTS, QUERY = "model.layers.0.mlp.experts", "model.layers.0.self_attn.q_proj"
LAYOUTS = {
    "another version": lambda layout: layout | {"format": 1},
    "no experts": lambda layout: {key: value for key, value in layout.items() if key != "experts"},
    "no native type": lambda layout: {key: value for key, value in layout.items() if key != "native_type"},
    "experts of numbers": lambda layout: layout | {"experts": 7},
    "a part without experts": lambda layout: layout | {"experts": {EXPERTS: {"up": [{"rank": 16}]}}},
    "parts that are no list": lambda layout: layout | {"experts": {EXPERTS: {"up": 3}}},
    "a format of another day": lambda layout: layout | {"linears": {QUERY: {"format": "x"}}},
    "none": lambda layout: None,
}


@pytest.mark.parametrize("use", [moesvd_quant.load, StreamedModel])
@pytest.mark.parametrize("change", LAYOUTS)
def test_a_damaged_layout_is_named(checkpoint, tmp_path, change, use):
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    config = json.loads((copy / "config.json").read_text())
    config["moesvd"] = LAYOUTS[change](config["moesvd"])
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"config\.json"):
        use(copy)


def test_a_model_without_a_tokenizer_is_said(make_model, tmp_path, small):
    copy = tmp_path / "copy"
    shutil.copytree(make_model("mixtral"), copy, ignore=shutil.ignore_patterns("tokenizer*", "special_tokens*"))
    with pytest.raises(ModelError, match=str(copy)):
        run("gptq4", copy, tmp_path / "out", small)
