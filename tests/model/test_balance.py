"""Balanced channels: nothing that a model computes changes, and it is compressed as if no channel had been large."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from expert_runs import job
from moesvd_quant.model.balance import exponents_of, is_linear_in_up
from moesvd_quant.model.experts import dense_weight, find_experts, intermediate, split_projections
from moesvd_quant.model.stream import StreamedModel
from tiny import tiny_model

LARGE, PLACES = 3, 5  # channels, and binary places that they are moved by
WINDOWS = torch.randint(1, 250, (2, 32), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def uneven(make_model, tmp_path):
    """uneven(architecture): (folder of a tiny model, of the same with some channels large in up and small in down)."""

    def make(architecture: str):
        plain, folder = make_model(architecture, torch.bfloat16), tmp_path / f"{architecture}-uneven"
        model = AutoModelForCausalLM.from_pretrained(plain)
        for _, experts in find_experts(model):
            weights = split_projections(experts)
            weights["up"][:, :LARGE] *= 2**PLACES
            weights["down"][:, :, :LARGE] /= 2**PLACES
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(plain).save_pretrained(folder)
        return plain, folder

    with torch.no_grad():
        yield make


@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe", "olmoe", "deepseek_v3"])
def test_nothing_that_is_computed_changes(architecture, uneven):
    plain, folder = uneven(architecture)
    [raw], [balanced] = (
        StreamedModel(folder, torch.float32, shared=True, balanced=balanced).logits(WINDOWS) for balanced in (0, 1)
    )
    assert torch.equal(raw, balanced)
    before, after = StreamedModel(plain), StreamedModel(folder, balanced=True)
    for index in range(len(before.layers)):
        meant = before.load_layer(index).state_dict()
        assert all(torch.equal(meant[name], found) for name, found in after.load_layer(index).state_dict().items())


def test_places_are_half_of_what_norms_are_apart():
    up, down = torch.randn(2, 8, 5), torch.randn(2, 6, 8)
    up /= up.norm(dim=2, keepdim=True)
    down /= down.norm(dim=1, keepdim=True)
    up[1] *= 64  # all of an expert: not a matter of channels
    up[0, 2], up[0, 3], down[0, :, 4], down[1, :, 5] = 16 * up[0, 2], 0, 16 * down[0, :, 4], 0
    assert exponents_of(up, down).tolist() == [[0, 0, -2, 0, 2, 0, 0, 0], [0.0] * 8]


def test_clamped_experts_and_those_with_biases_stay(make_model, monkeypatch):
    folder = make_model("gpt_oss")
    streamed = StreamedModel(folder, balanced=True)
    streamed.load_layer(0)
    assert not streamed.moved
    [(_, experts), *_] = find_experts(tiny_model("mixtral"))
    assert is_linear_in_up(experts)

    def clamped(self, joint):
        gate, up = joint.chunk(2, -1)
        return self.act_fn(gate) * up.clamp(-10, 10)

    monkeypatch.setattr(type(experts), "_apply_gate", clamped)
    assert not is_linear_in_up(experts)


def of_layers(folder):
    return {file.name: load_file(file) for file in folder.glob("model-layer-*.safetensors")}


@pytest.mark.parametrize(
    "stages",
    [
        "{gptq: {bits: 2, format: trellis}}",
        "{svd: {ratio: 0.4}}, {gptq: {bits: 3, error_aware: true}}",
        "{prune: {ratio: 0.25}}, {gptq: {bits: 3}}",
    ],
    ids=["trellis", "error-aware", "pruned"],
)
def test_a_model_with_large_channels_is_compressed_as_without(stages, uneven, tmp_path, small):
    made = []
    for folder, name in zip(uneven("mixtral"), ("without", "with")):
        (tmp_path / name).mkdir()
        made.append(of_layers(job(folder, tmp_path / name, small, stages, ["balance=true"]).run()[-1]))
    assert made[0].keys() == made[1].keys()
    for file, tensors in made[0].items():
        assert all(torch.equal(tensor, made[1][file][name]) for name, tensor in tensors.items()), file


def test_layers_that_are_not_compressed_compute_the_same_bits(uneven, tmp_path, small):
    _, folder = uneven("mixtral")
    stages = "{svd: {method: moe_svd, layers: [1], rank: 16}}"
    [made] = job(folder, tmp_path, small, stages, ["balance=true"]).run()
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    for expert in range(4):
        was, now = (
            intermediate(e, expert, x) @ dense_weight(e, "down", expert, x.dtype).T
            for e in (StreamedModel(place).load_layer(0).mlp.experts for place in (folder, made))
        )
        assert torch.equal(was, now)


def test_what_stays_native_is_moved_back(uneven):
    _, folder = uneven("qwen2_moe")
    raw, streamed = StreamedModel(folder), StreamedModel(folder, balanced=True)
    meant, layer = raw.load_layer(1).state_dict(), streamed.load_layer(1)
    assert streamed.moved and not torch.equal(meant["mlp.experts.down_proj"], layer.mlp.experts.down_proj)
    streamed.restore_native(1)
    assert all(torch.equal(meant[name], tensor) for name, tensor in layer.state_dict().items())
