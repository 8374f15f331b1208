"""What other software reads of ours: the same function, by transformers alone, compressed-tensors and GPTQModel."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPTQConfig

import moesvd_quant
from moesvd_quant.export.export import export_checkpoint
from moesvd_quant.export.gptq import describe
from moesvd_quant.export.packed_weights import PackedWeight, require_one_form
from moesvd_quant.model.folder import ModelError
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.run.run import Run
from moesvd_quant.runtime.grids import Grid
from moesvd_quant.runtime.stored import Stored

IDS = torch.randint(1, 250, (2, 40), generator=torch.Generator().manual_seed(5))

# In a process of its own: GPTQModel unfuses the experts of every model class it touches.
GPTQMODEL = """
import sys, torch
from gptqmodel import BACKEND, GPTQModel
model = GPTQModel.load(sys.argv[1], device="cpu", dtype=torch.float16, backend=BACKEND.GPTQ_TORCH)
kinds = sum(type(m).__name__ == "TorchLinear" for m in model.model.modules())
with torch.no_grad():
    torch.save((model.model(torch.load(sys.argv[2])).logits.float(), kinds), sys.argv[3])
"""


PLAIN = ("gptq.sym=true", "gptq.group_size=32")  # what other software wants


def compress(folder, out, small, recipe="gptq4", *overrides):
    return Run(load_recipe(recipe, [*small, *overrides]), folder, out).run()[-1]


def logits(model):
    with torch.no_grad():
        return model(IDS).logits.float()


def tensors_of(folder):
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def read_by_gptqmodel(folder, place):
    """(logits, number of packed linears)"""
    torch.save(IDS, place / "ids.pt")
    command = [sys.executable, "-c", GPTQMODEL, folder, place / "ids.pt", place / "out.pt"]
    environment = os.environ | {"GPTQMODEL_DISABLE_PACK_EXT": "1", "GPTQMODEL_CPU_WORKERS": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(place / "out.pt")


def compare_compressed_tensors(checkpoint, place):
    """Reads the form by its own library, tensor by tensor, and by transformers, against the dense weights. Returns the
    groups of its config."""
    for to in ("dense", "compressed-tensors"):
        export_checkpoint(checkpoint, place / to, to)
    plain, packed = (tensors_of(place / to) for to in ("dense", "compressed-tensors"))
    described = json.loads((place / "compressed-tensors" / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(described)
    experts = next(iter(config.config_groups.values()))
    linears = [*config.config_groups.values()][-1]
    assert {name for name in plain if ".experts." in name and name + "_packed" not in packed} == set()
    for name, weight in plain.items():
        if name in packed:
            assert torch.equal(packed.pop(name), weight)
            continue
        kinds = ("weight_packed", "weight_scale", "weight_shape")
        state = {kind: packed.pop(name.removesuffix("weight") + kind) for kind in kinds}
        scheme = experts if ".experts." in name else linears
        found = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
        assert torch.equal(found, weight), name
    assert not packed
    found, info = AutoModelForCausalLM.from_pretrained(place / "compressed-tensors", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(found), logits(AutoModelForCausalLM.from_pretrained(place / "dense")))
    return described["config_groups"]


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss", "deepseek_v2"])
@pytest.mark.parametrize("recipe", ["svd-gptq3", "svd"])
def test_dense_is_a_plain_model_with_the_same_logits(architecture, recipe, make_model, tmp_path, small):
    checkpoint = compress(make_model(architecture), tmp_path / "run", small, recipe)
    export_checkpoint(checkpoint, tmp_path / "dense", "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert config["model_type"] == architecture and "moesvd" not in config and "auto_map" not in config
    assert not (tmp_path / "dense" / "modeling_moesvd.py").exists()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert "Moesvd" not in type(plain).__name__
    assert torch.allclose(logits(plain), logits(moesvd_quant.load(checkpoint)), atol=2e-4)


@pytest.mark.parametrize(
    "architecture,bits,to",
    [
        pytest.param("mixtral", 4, "gptqmodel", marks=pytest.mark.slow),
        pytest.param("qwen2_moe", 3, "gptq", marks=pytest.mark.slow),
    ],
)
def test_gptqmodel_reads_the_standard_form_with_the_same_logits(architecture, bits, to, make_model, tmp_path, small):
    folder = make_model(architecture, torch.float16)
    checkpoint = compress(folder, tmp_path / "run", small, "gptq4", *PLAIN, f"gptq.bits={bits}")
    export_checkpoint(checkpoint, tmp_path / "gptq", to)
    got, kinds = read_by_gptqmodel(tmp_path / "gptq", tmp_path)
    expected = logits(moesvd_quant.load(checkpoint, dtype=torch.float32))
    original = logits(moesvd_quant.load(folder, dtype=torch.float32))
    assert kinds == (32 if architecture == "mixtral" else 50)  # attention and every expert matrix
    # Token by token: in fp16 a router near a tie may choose another expert, in a few of 80 tokens at most.
    apart, cost = (((other - expected).norm(dim=-1) / expected.norm(dim=-1)).flatten() for other in (got, original))
    assert apart.median() < 0.005 and (apart < 0.01).float().mean() > 0.9
    assert apart.median() < 0.1 * cost.median()


# transformers opens GPTQ by optimum, which knows linears alone: here it is given those, and not the experts.
OPTIMUM = """
import json, sys, torch
from pathlib import Path
from optimum.gptq import GPTQQuantizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig
folder = Path(sys.argv[1])
config = json.loads((folder / "config.json").read_text())
described = config.pop("quantization_config") | {"dataset": None, "backend": "gptq_torch"}
linears = [f"self_attn.{kind}_proj" for kind in "qkvo"]
reader = GPTQQuantizer.from_dict(described | {"modules_in_block_to_quantize": [linears]})
model = AutoModelForCausalLM.from_config(MixtralConfig(**config), dtype=torch.float16)
model = reader.convert_model(model, device_map={"": "cpu"})
tensors = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
attention = {name: t for name, t in tensors.items() if "self_attn" in name}
assert not model.load_state_dict(attention, strict=False).unexpected_keys
model = reader.post_init_model(model).eval()
found = {}
with torch.no_grad():
    for layer in range(config["num_hidden_layers"]):
        for name in linears:
            path = f"model.layers.{layer}.{name}"
            linear = model.get_submodule(path)
            found[path] = linear(torch.eye(linear.in_features, dtype=torch.float16)).T.float().contiguous()
save_file(found, sys.argv[2])
"""


@pytest.mark.slow
def test_optimum_reads_the_linears_that_it_knows(make_model, tmp_path, small):
    """Each weight as its products with unit vectors, against the dense export."""
    checkpoint = compress(make_model("mixtral", torch.float16), tmp_path / "run", small, "gptq4", *PLAIN)
    for to in ("dense", "gptqmodel"):
        export_checkpoint(checkpoint, tmp_path / to, to)
    command = [sys.executable, "-c", OPTIMUM, tmp_path / "gptqmodel", tmp_path / "out.safetensors"]
    environment = os.environ | {"GPTQMODEL_DISABLE_PACK_EXT": "1", "GPTQMODEL_CPU_WORKERS": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    plain, found = tensors_of(tmp_path / "dense"), load_file(tmp_path / "out.safetensors")
    assert len(found) == 8
    for path, weight in found.items():
        assert torch.allclose(weight, plain[f"{path}.weight"].float(), rtol=2e-3, atol=1e-5), path


@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe"])
def test_gptq_has_the_names_of_the_files_and_transformers_refuses_it(architecture, make_model, tmp_path, small):
    checkpoint = compress(make_model(architecture), tmp_path / "run", small, "gptq4", *PLAIN)
    for to in ("dense", "gptq"):
        export_checkpoint(checkpoint, tmp_path / to, to)
    plain, packed = tensors_of(tmp_path / "dense"), tensors_of(tmp_path / "gptq")
    quantized = {name.removesuffix("qweight") + "weight" for name in packed if name.endswith(".qweight")}
    assert {name for name in plain if ".experts." in name} <= quantized <= set(plain)
    assert set(plain) - quantized == {name for name in packed if name.endswith((".weight", ".bias"))}
    for more in ({}, {"quantization_config": GPTQConfig(bits=4)}):
        with pytest.raises(ValueError, match="transformers cannot read experts in the GPTQ format"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "gptq", **more)


@pytest.mark.parametrize(
    "architecture,bits",
    [
        ("mixtral", 4),
        ("qwen2_moe", 3),
        pytest.param("phimoe", 2, marks=pytest.mark.slow),
        pytest.param("deepseek_v2", 8, marks=pytest.mark.slow),
    ],
)
def test_compressed_tensors_holds_the_same_weights(architecture, bits, make_model, tmp_path, small):
    checkpoint = compress(make_model(architecture), tmp_path / "run", small, "gptq4", *PLAIN, f"gptq.bits={bits}")
    compare_compressed_tensors(checkpoint, tmp_path)


@pytest.mark.slow
def test_experts_and_attention_may_have_different_widths(make_model, tmp_path, small):
    (tmp_path / "mine.yaml").write_text(
        "budget: 5bpw\nlimits: {widths: [3]}\nstages: [{gptq: {sym: true, group_size: 32}}]"
    )
    checkpoint = Run(load_recipe(tmp_path / "mine.yaml", small), make_model("mixtral"), tmp_path / "run").run()[-1]
    groups = compare_compressed_tensors(checkpoint, tmp_path)
    assert {name: group["weights"]["num_bits"] for name, group in groups.items()} == {"experts": 3, "linears": 4}
    export_checkpoint(checkpoint, tmp_path / "gptqmodel", "gptqmodel")
    got, kinds = read_by_gptqmodel(tmp_path / "gptqmodel", tmp_path)
    expected = logits(moesvd_quant.load(checkpoint, dtype=torch.float32))
    assert kinds == 32  # attention and every expert matrix
    apart = (got - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert apart.median() < 0.005 and (apart < 0.01).float().mean() > 0.9


@pytest.mark.parametrize(
    "architecture,recipe,to,message",
    [
        ("mixtral", "svd-gptq4", "gptq", r"is factorized or not quantized; export it --to dense"),
        ("mixtral", "gptq4", "onnx", "--to onnx: is none of dense, compressed-tensors, gptq, gptqmodel"),
        ("mixtral", "gptq4", "gptq", "vLLM and GPTQModel take no zero points; quantize again with gptq.sym=true"),
        ("mixtral", "gptq4", "compressed-tensors", "no zero points in this format; quantize again with gptq.sym=true"),
        ("gpt_oss", "gptq4", "gptq", "experts with biases have no such form; export it --to dense"),
    ],
)
def test_what_cannot_be_exported(make_model, tmp_path, small, architecture, recipe, to, message):
    checkpoint = compress(make_model(architecture), tmp_path / "run", small, recipe)
    with pytest.raises(ModelError, match=message):
        export_checkpoint(checkpoint, tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


def test_files_that_hold_experts_together_have_no_compressed_tensors(make_architecture, tmp_path, small):
    form = ("gptq.sym=true", "gptq.group_size=8", "gptq.attention=false")
    checkpoint = compress(make_architecture("granitemoe"), tmp_path / "run", small, "gptq4", *form)
    with pytest.raises(ModelError, match="files of granitemoe hold the experts of a layer in one tensor"):
        export_checkpoint(checkpoint, tmp_path / "out", "compressed-tensors")


@pytest.mark.parametrize("to", ["gptq", "compressed-tensors"])
def test_experts_on_unlike_grids_are_named_with_what_makes_them_alike(make_model, tmp_path, small, to):
    checkpoint = compress(make_model("mixtral"), tmp_path / "run", small, "gptq4", "gptq.sym=true")
    message = (
        "model.layers.0.mlp.experts: expert 0, gate has groups of 64, model.layers.0.mlp.experts: expert 0, down has "
        "groups of 32; .* Quantize again with gptq.group_size=32"
    )
    with pytest.raises(ModelError, match=message):
        export_checkpoint(checkpoint, tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


def test_widths_that_differ_are_named_with_what_makes_them_alike():
    at = [("layer.0", 2), ("layer.0", 3), ("layer.1", 3)]
    module = Stored()
    weights = [PackedWeight(module, "up", home, Grid(bits, 32, True), 0, None, 0, "up") for home, bits in at]
    require_one_form(weights[1:], "nobody")
    with pytest.raises(ModelError, match=r"has 3 bits, .* has 2 bits; kernels. .* limits.one_width_per_layer=true"):
        require_one_form(weights, "kernels")
    with pytest.raises(ModelError, match=r"layer.1: expert 0, up has 3 bits, layer.0: .* one width for gptq.bits"):
        require_one_form([weights[0], weights[2]], "transformers")


def test_gptq_says_what_is_not_as_usual_by_the_paths_of_both_engines():
    module, bits = Stored(), {0: 4, 1: 3}
    experts = [
        PackedWeight(module, "up", f"layers.{layer}.mlp.experts", Grid(bits[layer], 32, True), 0, None, expert, "up")
        for layer, expert in (*((0, i) for i in range(6)), (1, 0), (1, 1))
    ]
    forms = {"attn.q_proj": 8, "attn.k_proj": 8, "mlp.up_proj": 8, "dense.up_proj": 8, "dense.down_proj": 4}
    linears = [PackedWeight(module, "weight", f"layers.0.{path}", Grid(n, 32, True)) for path, n in forms.items()]
    head = PackedWeight(module, "weight", "lm_head", Grid(8, 32, True))

    def in_files(weight):
        return weight.home if weight.expert is None else f"{weight.home}.{weight.expert}.w3".replace("mlp", "moe")

    described = describe([*linears, head, *experts], in_files, ["layers.0.mlp.gate", "lm_head"])

    def bits_of(path):
        """As vLLM and GPTQModel look it up: the first pattern that matches from the start."""
        for pattern, more in described["dynamic"].items():
            if re.match(pattern[2:], path):
                return None if pattern.startswith("-:") else more["bits"]
        return described["bits"]

    asked = {
        "layers.0.mlp.experts.0.up_proj": 4, "layers.1.mlp.experts.1.up_proj": 3, "layers.0.moe.experts": 4,
        "layers.1.moe.experts": 3, "layers.11.moe.experts": 4, "layers.0.attn.qkv_proj": 8, "layers.0.mlp.up_proj": 8,
        "layers.0.mlp.experts": 4, "layers.0.dense.up_proj": 8, "layers.0.dense.down_proj": 4, "lm_head": 8,
        "layers.0.mlp.gate": None,
    }  # fmt: skip
    assert {path: bits_of(path) for path in asked} == asked
    assert described["bits"] == 4 and described["lm_head"]


def test_an_original_or_a_full_folder_is_refused(make_model, tmp_path):
    with pytest.raises(ModelError, match="nothing to export"):
        export_checkpoint(make_model("mixtral"), tmp_path / "out", "dense")
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ModelError, match="not empty"):
        export_checkpoint(make_model("mixtral"), tmp_path, "dense")
