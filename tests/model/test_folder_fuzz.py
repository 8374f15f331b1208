"""Folders with one thing wrong: read as transformers reads them, or refused by name in seconds; never another model."""

import json
import shutil
import time
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import moesvd_quant
from architecture_check import IDS, apart, logits
from moesvd_quant.errors import ModelError
from moesvd_quant.model.stream import StreamedModel
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.run.run import Run
from moesvd_quant.runtime.modeling_moesvd import file_digest

ARCHITECTURES = ["mixtral", "deepseek_v3"]
SECONDS = 5
# Of keys that say nothing of the model: how it is written, or trained.
SILENT = ("architectures", "transformers_version", "initializer_range", "router_aux_loss_coef", "output_router_logits")


def remove(name, found):
    del found[name]


def rename(name, found):
    found[f"{name}_x"] = found.pop(name)


def wider(name, found):
    found[name] = found[name].double() if found[name].dtype == torch.float32 else found[name].float()


def misshapen(name, found):
    found[name] = torch.cat([found[name], found[name]])


def moved(name, found):
    """Under a name that another layer or expert would have."""
    found[name.replace(".0.", ".9.").replace(".1.", ".9.")] = found.pop(name)


CHANGES = {change.__name__: change for change in (remove, rename, wider, misshapen, moved)}


def other(value):
    """A value of the same kind that is not this one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 2 + 1
    if isinstance(value, list):
        return value[:-1]
    return {"bfloat16": "float16", "float32": "bfloat16"}.get(value, "unheard") if isinstance(value, str) else 3


def readings(folder) -> tuple[str | None, torch.Tensor | None]:
    """(message of the refusal, None), or (None, logits); both ways of reading must agree."""
    results = []
    for use in (lambda: logits(moesvd_quant.load(folder, torch.float32)), partial(walked, folder)):
        started = time.perf_counter()
        try:
            results.append((None, use()))
        except ModelError as error:
            results.append((str(error), None))
            assert time.perf_counter() - started < SECONDS, "it is refused late"
    (said, one), (also, two) = results
    assert (said is None) == (also is None), (said, also)
    if one is not None:
        assert apart(two, one) < 1e-4, "the walk reads another model than load"
    return said, one


def walked(folder) -> torch.Tensor:
    return torch.cat(list(StreamedModel(folder, torch.float32).logits(IDS, 2)))


def in_transformers(folder) -> torch.Tensor | None:
    """The logits of transformers; None where it fails, or leaves something out or makes it up."""
    try:
        kind = AutoModelForCausalLM
        model, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        if any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")):
            return None
        return logits(model.eval())
    except Exception:  # whatever it says, it does not read the folder
        return None


def right_or_refused(folder, *names: str) -> None:
    said, found = readings(folder)
    if said is not None:
        assert any(name in said for name in (*names, str(folder))), said
        return
    expected = in_transformers(folder)
    assert expected is not None, "transformers does not read this folder, and we read something"
    assert apart(found, expected) < 1e-4


def tensor_names(folder) -> list[str]:
    return sorted(load_file(folder / "model.safetensors"))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_tensor_is_wrong(architecture, change, make_model, tmp_path):
    original = make_model(architecture, torch.bfloat16)
    for name in tensor_names(original):
        folder = shutil.copytree(original, tmp_path / "model")
        found = load_file(folder / "model.safetensors")
        CHANGES[change](name, found)
        save_file(found, folder / "model.safetensors", {"format": "pt"})
        right_or_refused(folder, name)
        shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_tensor_is_there_twice(architecture, make_model, tmp_path):
    original = make_model(architecture, torch.bfloat16)
    for name in tensor_names(original):
        folder = shutil.copytree(original, tmp_path / "model")
        found = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").rename(folder / "a.safetensors")
        save_file({name: found[name] * 2}, folder / "b.safetensors", {"format": "pt"})
        index = {"weight_map": dict.fromkeys(found, "a.safetensors") | {name: "b.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        said, _ = readings(folder)
        assert said is not None and name in said
        shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("how", ["removed", "contradicted"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_key_of_the_config_is_wrong(architecture, how, make_model, tmp_path):
    original = make_model(architecture, torch.bfloat16)
    config = json.loads((original / "config.json").read_text())
    for key in config.keys() - {*SILENT}:
        folder = shutil.copytree(original, tmp_path / "model")
        changed = {name: value for name, value in config.items() if name != key}
        if how == "contradicted":
            changed[key] = other(config[key])
        (folder / "config.json").write_text(json.dumps(changed))
        right_or_refused(folder, key)
        shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("change", CHANGES)
def test_one_tensor_of_a_checkpoint_of_ours_is_wrong(change, make_model, tmp_path, small):
    original = Run(load_recipe("svd-gptq4", small), make_model("mixtral"), tmp_path / "out").run()[-1]
    expected = readings(original)[1]
    for file in sorted(original.glob("*.safetensors")):
        for name in load_file(file):
            folder = shutil.copytree(original, tmp_path / "model")
            found = load_file(file)
            CHANGES[change](name, found)
            changed = set(found) - set(load_file(file))
            save_file(found, folder / file.name, {"format": "pt"})
            index = json.loads((folder / "model.safetensors.index.json").read_text())
            places = {key: place for key, place in index["weight_map"].items() if place != file.name}
            index["weight_map"] = places | dict.fromkeys(found, file.name)
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
            manifest = json.loads((folder / "moesvd.json").read_text())
            manifest["digests"][file.name] = file_digest(folder / file.name)
            (folder / "moesvd.json").write_text(json.dumps(manifest))
            said, got = readings(folder)
            assert torch.equal(got, expected) if said is None else any(key in said for key in {name, *changed})
            shutil.rmtree(folder)
