"""Stage `sparsify`: the masks are the papers', layer after layer; what is stored, and what can stand beside it."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import moesvd_quant
from expert_runs import IDS, job, logits
from moesvd_quant.decompose.sparsity import TWO_OF_FOUR, Pattern
from moesvd_quant.export.export import export_checkpoint
from moesvd_quant.model.experts import dense_weight, find_experts, find_linears
from moesvd_quant.model.folder import ModelError
from moesvd_quant.planning.context import StageError
from moesvd_quant.quantize.feedback import HessianFactor
from moesvd_quant.quantize.sparsegpt import sparsegpt
from moesvd_quant.recipe.recipe import RecipeError
from moesvd_quant.run.plan import plan_stages


def inputs_of_linears(model, layer, windows):
    """{path: inputs (tokens, in)} of the linears of a layer, and {path: [inputs of gate and up of each expert]}, from
    what transformers hands its modules."""
    linears, experts, hooks = {}, {}, []

    def of_linear(path):
        return lambda module, args: linears.update({path: args[0].reshape(-1, args[0].shape[-1])})

    def of_experts(path):
        def hook(module, args):
            hidden, index, _ = args
            count = module.num_experts if hasattr(module, "num_experts") else module.experts
            experts[path] = [hidden[(index == e).any(-1)] for e in range(count)]

        return hook

    for path, linear in find_linears(layer):
        hooks.append(linear.register_forward_pre_hook(of_linear(path)))
    for path, module in find_experts(layer):
        hooks.append(module.register_forward_pre_hook(of_experts(path)))
    with torch.no_grad():
        model(windows)
    for hook in hooks:
        hook.remove()
    return linears, experts


def own_gram(inputs, expert):
    """An expert's Gram matrix, with n tokens' worth of its layer's: as all stages judge an expert by its own inputs."""
    tokens = sum(map(len, inputs))
    pooled = sum(x.T @ x for x in inputs) / tokens
    return inputs[expert].T @ inputs[expert] + pooled * pooled.shape[0]


def by_hand(method, weight, gram, pattern):
    if method == "sparsegpt":
        return sparsegpt(weight, HessianFactor.in_place(gram, 0.01), pattern)[0]
    scores = weight.abs() * gram.diagonal().sqrt()
    size = pattern.group or weight.shape[1]
    parts = scores.unflatten(1, (-1, size))
    edge = parts.sort(-1).values[..., int(size * pattern.ratio)]
    return weight * (parts >= edge[..., None]).flatten(1)


@pytest.mark.parametrize(
    ("method", "given", "pattern"),
    [
        ("wanda", "pattern: '2:4'", TWO_OF_FOUR),
        ("wanda", "pattern: unstructured, ratio: 0.3", Pattern(0.3)),
        ("sparsegpt", "pattern: '2:4'", TWO_OF_FOUR),
    ],
)
def test_each_layer_is_made_sparse_on_the_inputs_that_sparse_layers_give(
    method, given, pattern, make_model, tmp_path, small
):
    folder = make_model("mixtral")
    run = job(folder, tmp_path, small, f"{{sparsify: {{method: {method}, {given}}}}}")
    [made] = run.run()
    sparse, mixed = moesvd_quant.load(made), moesvd_quant.load(folder)
    for index, layer in enumerate(mixed.model.layers):
        linears, experts = inputs_of_linears(mixed, layer, run.windows)
        done = sparse.model.layers[index]
        for path, x in linears.items():
            expected = by_hand(method, layer.get_submodule(path).weight, x.T @ x, pattern)
            assert torch.allclose(done.get_submodule(path).dense_weight(), expected, atol=1e-4), path
        for path, inputs in experts.items():
            for expert in range(4):
                for name in ("gate", "up"):
                    weight = dense_weight(layer.get_submodule(path), name, expert)
                    expected = by_hand(method, weight, own_gram(inputs, expert), pattern)
                    found = done.get_submodule(path).dense(name, expert)
                    assert torch.allclose(found, expected, atol=1e-4), (index, name, expert)
        mixed.model.layers[index] = done


def test_bytes_and_weights_are_counted_and_the_files_are_as_large(make_model, tmp_path, small):
    run = job(make_model("qwen2_moe", torch.bfloat16), tmp_path, small, "sparsify")
    [made] = run.run()
    account = run.forecasts[0]["accounting"]
    assert account["disk_bytes"] == sum(f.stat().st_size for f in made.glob("*.safetensors"))
    assert account["expert_ratio"] == 0.5 and account["bits_per_expert_weight"] == 9
    model = moesvd_quant.load(made)
    linears = [linear for layer in model.model.layers for _, linear in find_linears(layer)]
    zeros = sum(int((linear.dense_weight() == 0).sum()) for linear in linears)
    gone = account["original_params"] - account["params"]
    assert gone == zeros + account["original_expert_params"] // 2


def test_attention_can_stay_and_owl_spreads_the_ratio(make_model, tmp_path, small):
    stages = "{sparsify: {pattern: unstructured, ratio: 0.5, layers: owl, attention: false}}"
    run = job(make_model("qwen3_moe", num_hidden_layers=3), tmp_path, small, stages)
    [made] = run.run()
    ratios = run.forecasts[0]["notes"]["left out"].values()
    assert max(ratios) - min(ratios) == pytest.approx(0.16) and sum(ratios) == pytest.approx(1.5)
    assert run.forecasts[0]["notes"]["kept whole"]["model.layers.0.self_attn.q_proj"] == "attention: false"
    assert run.forecasts[0]["accounting"]["expert_ratio"] == pytest.approx(0.5, abs=0.02)
    assert torch.isfinite(logits(made)).all()


def test_a_sparse_model_opens_without_us_with_its_zeros(make_model, tmp_path, small):
    [made] = job(make_model("mixtral"), tmp_path, small, "sparsify").run()
    export_checkpoint(made, tmp_path / "plain", "dense")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    assert not type(plain).__module__.startswith("moesvd")
    weight = plain.model.layers[0].self_attn.q_proj.weight
    assert (weight.unflatten(1, (-1, 4)) == 0).sum(-1).eq(2).all()
    with torch.no_grad():
        assert torch.allclose(plain(IDS).logits, logits(made), atol=1e-5)
    with pytest.raises(ModelError, match="is in format sparse, and other software reads grids; export it --to dense"):
        export_checkpoint(made, tmp_path / "gptq", "gptq")


def test_pruned_experts_become_sparse(make_model, tmp_path, small):
    _, made = job(make_model("qwen3_moe"), tmp_path, small, "{prune: {ratio: 0.5}}, sparsify").run()
    [experts] = [module for _, module in find_experts(moesvd_quant.load(made).model.layers[0])]
    assert experts.experts == 3 and all(form.name == "sparse" for form in experts.formats.values())
    assert torch.isfinite(logits(made)).all()


@pytest.mark.parametrize("train", ["adapters", "scales"])
def test_healing_keeps_every_zero(train, make_model, tmp_path, small):
    lora = f"lora: {{train: {train}, rank: 8, steps: 6, batch: 2, microbatch: 2, length: 32, validation: 4, lr: 0.002}}"
    before, made = job(make_model("mixtral"), tmp_path, small, f"sparsify, {{{lora}}}").run()
    assert not torch.equal(logits(before), logits(made))
    old, new = ({} | tensors(folder) for folder in (before, made))
    masks = {name for name in old if name.endswith("_mask")}
    assert len(masks) == 2 * (4 + 3) and all(torch.equal(old[name], new[name]) for name in masks)
    values = [name for name in old if name.endswith("_values")]
    moved = [name for name in values if not torch.equal(old[name], new[name])]
    assert moved == (values if train == "scales" else [])


def tensors(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def test_what_cannot_be_is_refused_before_any_work(make_model, tmp_path, small):
    mixtral = make_model("mixtral")
    for stages, said in (
        ("sparsify, {gptq: {bits: 4}}", r"stages\[1\].gptq: cannot come after sparsify"),
        ("{svd: {ratio: 0.3}}, sparsify", r"stages\[1\].sparsify: cannot come after svd"),
        ("{sparsify: {ratio: 0.3}}", "ratio: only with pattern: unstructured"),
        ("{sparsify: {damp: 0.3}}", "damp: only with method: sparsegpt"),
        ("{sparsify: {pattern: unstructured}}", "ratio: is required with pattern: unstructured"),
        ("{sparsify: {pattern: unstructured, ratio: 1.0}}", "1.0 is not between 0 and 1"),
    ):
        with pytest.raises(RecipeError, match=said):
            job(mixtral, tmp_path, small, stages)
    odd = make_model("mixtral", intermediate_size=98)
    with pytest.raises(StageError, match=r"experts.down: 98 inputs do not part into groups of 4; use pattern: unstr"):
        plan_stages(job(odd, tmp_path, small, "sparsify"))
    [made] = job(mixtral, tmp_path, small, "{sparsify: {attention: false}}").run()
    with pytest.raises(StageError, match=r"experts\.\w+: is sparse already"):
        plan_stages(job(made, tmp_path, small, "{gptq: {bits: 4}}"))
    with pytest.raises(StageError, match="experts: is changed already; sparsify takes the original's matrices"):
        plan_stages(job(made, tmp_path, small, "sparsify"))
