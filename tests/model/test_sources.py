"""Checkpoints quantized as published: an encoder of our own writes them, its decoder is the truth."""

import json
import math
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import moesvd_quant
from moesvd_quant.model.experts import find_experts, split_projections
from moesvd_quant.model.folder import ModelError
from moesvd_quant.model.stream import StreamedModel
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.run.run import Run
from tiny import tiny_tokenizer

BLOCK = 32
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def fp8(weight):
    """(codes, scale per block of 32 x 32 whose last one may be short, what they stand for)."""
    rows, columns = weight.shape
    grid = torch.zeros(math.ceil(rows / BLOCK), math.ceil(columns / BLOCK))
    codes, value = torch.zeros(rows, columns, dtype=torch.float8_e4m3fn), torch.zeros(rows, columns)
    for i in range(grid.shape[0]):
        for j in range(grid.shape[1]):
            at = slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)
            grid[i, j] = weight[at].abs().max() / 448
            codes[at] = (weight[at] / grid[i, j]).to(torch.float8_e4m3fn)
            value[at] = codes[at].float() * grid[i, j]
    return codes, grid, value


def mxfp4(weight):
    """(blocks (..., in/32, 16) uint8, scales (..., in/32) uint8, what they stand for); 32 values share 2**e."""
    groups = weight.unflatten(-1, (-1, 32))
    exponent = groups.abs().amax(-1).log2().floor() - 2
    scaled = groups / 2 ** exponent[..., None]
    code = (scaled.abs()[..., None] - FP4).abs().argmin(-1)
    value = FP4[code] * scaled.sign() * 2 ** exponent[..., None]
    code = code + 8 * (scaled < 0)
    blocks = (code[..., 0::2] | code[..., 1::2] << 4).to(torch.uint8)
    return blocks, (exponent + 127).to(torch.uint8), value.flatten(-2)


def quantized(folder, out, kind):
    """A copy of a model folder in FP8 or MXFP4, and what its tensors stand for by name."""
    shutil.copytree(folder, out)
    tensors, written, meant = load_file(out / "model.safetensors"), {}, {}
    for name, tensor in tensors.items():
        tensor = tensor.float()
        if (kind == "fp8" and name.endswith("_proj.weight")) or ".kv_a_proj" in name:
            written[name], written[f"{name}_scale_inv"], meant[name] = fp8(tensor)
        elif kind == "mxfp4" and name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            blocks, scales, value = mxfp4(tensor.transpose(1, 2))  # the published form has (out, in)
            written |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            meant[name] = value.transpose(1, 2)
        else:
            written[name] = meant[name] = tensor.bfloat16()
    save_file({k: v.contiguous() for k, v in written.items()}, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text()) | {"dtype": "bfloat16"}
    config["quantization_config"] = {"quant_method": kind}
    if kind == "fp8":
        config["quantization_config"] |= {"weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
    (out / "config.json").write_text(json.dumps(config))
    return meant


SOURCES = {"fp8": "deepseek_v3", "mxfp4": "gpt_oss"}


@pytest.fixture(scope="module", params=SOURCES)
def source(request, make_architecture, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param) / "model"
    return request.param, out, quantized(make_architecture(SOURCES[request.param]), out, request.param)


def test_values_are_those_of_the_encoder(source):
    kind, folder, meant = source
    streamed = StreamedModel(folder)
    layer = streamed.load_layer(1)
    prefix = streamed.layer_names[1]
    (path, experts), *_ = find_experts(layer)
    for name, weight in split_projections(experts).items():
        for expert in range(2):
            if kind == "fp8":
                expected = meant[f"{prefix}.{path}.{expert}.{name}_proj.weight"]
            elif name == "down":
                expected = meant[f"{prefix}.{path}.down_proj"][expert].T
            else:
                expected = meant[f"{prefix}.{path}.gate_up_proj"][expert].T[(name == "up") :: 2]
            assert torch.equal(weight[expert], expected.bfloat16())
    if kind == "fp8":  # 48 rows: the last block is short
        linear = layer.self_attn.kv_a_proj_with_mqa
        assert linear.weight.shape[0] % BLOCK
        assert torch.equal(linear.weight, meant[f"{prefix}.self_attn.kv_a_proj_with_mqa.weight"].bfloat16())


def test_it_is_compressed_and_compared_with_the_bytes_of_its_files(source, tmp_path, small, text):
    _, folder, _ = source
    checkpoint = Run(load_recipe("svd-gptq4", [*small, "svd.ratio=0.1"]), folder, tmp_path / "out").run()[-1]
    manifest = json.loads((checkpoint / "moesvd.json").read_text())
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    assert manifest["accounting"]["original_bytes"] == sum(t.numel() * t.element_size() for t in tensors)
    original, made = moesvd_quant.load(folder), moesvd_quant.load(checkpoint)
    assert original.dtype == made.dtype == torch.bfloat16
    ids = tiny_tokenizer()(text.read_text()[:200], return_tensors="pt").input_ids
    with torch.no_grad():
        p, q = (model(ids).logits.float().log_softmax(-1) for model in (original, made))
        for _, experts in find_experts(original):
            split_projections(experts)["down"].zero_()
        without = original(ids).logits.float().log_softmax(-1)
    lost, all_lost = (float((p.exp() * (p - other)).sum(-1).mean()) for other in (q, without))
    assert 0 < lost < 0.5 * all_lost


def test_another_quantization_is_refused(make_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(make_model("mixtral"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "awq", "bits": 4}})
    )
    for open_it in (StreamedModel, moesvd_quant.load):
        with pytest.raises(ModelError, match=r"quantized \(awq\).*fp8 and mxfp4"):
            open_it(folder)
