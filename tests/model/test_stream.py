"""The layer walk against the whole model in memory; damaged files are found."""

import shutil

import pytest
import torch
from greenlet import getcurrent
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moesvd_quant.model.folder import ModelError
from moesvd_quant.model.stateful import Forward
from moesvd_quant.model.stream import StreamedModel
from tiny import ARCHITECTURES

WINDOWS = torch.randint(1, 250, (5, 32), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_streamed_logits_are_those_of_the_model_in_memory(architecture, make_model):
    folder = make_model(architecture)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    streamed = StreamedModel(folder)
    got = torch.cat(list(streamed.logits(WINDOWS, batch_size=2)))
    with torch.no_grad():
        expected = torch.cat([model(batch).logits for batch in WINDOWS.split(2)])
    assert torch.allclose(got, expected, atol=1e-5)
    held = [p for layer in streamed.layers for p in layer.parameters() if p.device.type != "meta"]
    assert not held  # every layer gave its memory back


def damaged(folder, tmp_path, change):
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    change(copy / "model.safetensors")
    return copy


def test_truncated_shard(make_model, tmp_path):
    copy = damaged(make_model("mixtral"), tmp_path, lambda file: file.write_bytes(file.read_bytes()[:-100]))
    with pytest.raises(ModelError, match=r"model\.safetensors: truncated or damaged"):
        StreamedModel(copy)


def test_nan_names_tensor_and_place(make_model, tmp_path):
    def poison(file):
        tensors = load_file(file)
        name = next(n for n in tensors if "layers.1" in n and "experts.2" in n)
        tensors[name][3, 4] = float("nan")
        save_file(tensors, file, metadata={"format": "pt"})

    copy = damaged(make_model("mixtral"), tmp_path, poison)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.experts\.\w+ is not finite at \[2, \d+, 4\]"):
        list(StreamedModel(copy).logits(WINDOWS))


def test_a_missing_tensor_is_named(make_model, tmp_path):
    def lose(file):
        tensors = load_file(file)
        tensors.pop(next(n for n in tensors if "layers.1.self_attn.q_proj" in n))
        save_file(tensors, file, metadata={"format": "pt"})

    copy = damaged(make_model("mixtral"), tmp_path, lose)
    with pytest.raises(ModelError, match=r"missing.*layers\.1\.self_attn\.q_proj"):
        list(StreamedModel(copy).logits(WINDOWS))


def test_pickle_is_not_read(make_model, tmp_path):
    copy = damaged(make_model("mixtral"), tmp_path, lambda file: file.rename(file.with_name("pytorch_model.bin")))
    with pytest.raises(ModelError, match="only safetensors are read"):
        StreamedModel(copy)


def test_no_model_at_all(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        StreamedModel(tmp_path)


def test_what_suspended_frames_hold_is_found():
    """In each frame, also where `frame.f_locals` is no dictionary (from Python 3.13 on)."""
    held, below, given = torch.zeros(2), torch.ones(3), torch.ones(4)

    def layer():
        under, number = below, 1
        getcurrent().at_layer(0, (given,), {})
        return under, number

    def model(input_ids, use_cache):
        kept = [held]
        layer()
        return kept

    forward = Forward(model, WINDOWS)
    forward.start()
    assert {id(tensor) for tensor in forward.beside()} == {id(tensor) for tensor in (below, held, WINDOWS)}
    assert torch.is_grad_enabled()  # whoever walks is left alone
    forward.answer(None)
    assert forward.dead
