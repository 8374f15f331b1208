"""What is trained, and towards what: each part against the formula or the library that defines it."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

import moesvd_quant
from architectures import tiny_architecture
from moesvd_quant.calibration import windows
from moesvd_quant.checkpoint.layout import projections_of
from moesvd_quant.healing import trainer
from moesvd_quant.healing.adapters import Trained
from moesvd_quant.healing.losses import divergence, next_token, output_error
from moesvd_quant.healing.nf4 import freeze_in_nf4
from moesvd_quant.healing.rounding import validation_loss
from moesvd_quant.healing.targets import float_targets, router_parameters
from moesvd_quant.healing.trainer import lm_loss
from moesvd_quant.model.experts import find_experts
from moesvd_quant.model.layered import _decoder_layers
from moesvd_quant.model.stream import StreamedModel
from moesvd_quant.planning.context import StageError
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.recipe.recipe import RecipeError
from moesvd_quant.run.plan import plan_stages
from moesvd_quant.run.run import Run
from moesvd_quant.runtime.factorized_experts import FactorizedExperts
from moesvd_quant.runtime.grids import Grid
from moesvd_quant.runtime.packing import pack
from moesvd_quant.stages import lora_work
from moesvd_quant.stages.lora import Lora
from tiny import tiny_model, tiny_tokenizer

IDS = torch.randint(1, 250, (4, 48), generator=torch.Generator().manual_seed(5))
LAYERS = ["model.layers.0", "model.layers.1"]


def test_losses_are_the_formulas():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 5, 7, generator=generator) for _ in range(2))
    ids = torch.randint(0, 7, (2, 5), generator=generator)
    p, q = (x.double().softmax(-1) for x in (a, b))
    by_hand = -sum(float(p[n, t, ids[n, t + 1]].log()) for n in range(2) for t in range(4)) / 8
    assert float(next_token(a, ids)) == pytest.approx(by_hand, rel=1e-5)
    assert float(divergence(a, b)) == pytest.approx(float((q * (q / p).log()).sum(-1).mean()), rel=1e-5)
    assert float(divergence(a, a)) == pytest.approx(0, abs=1e-6)
    assert float(output_error(a, b)) == pytest.approx(float(((a - b) ** 2).sum() / (b**2).sum()), rel=1e-5)


def test_streamed_validation_is_the_whole_models_loss(compressed):
    folder = compressed("svd", "mixtral", "svd.ratio=0.3")
    model = moesvd_quant.load(folder)
    with torch.no_grad():
        whole = float(model(IDS, labels=IDS).loss)
    assert validation_loss(StreamedModel(folder), IDS) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("train", ["adapters", "factors", "router", "scales"])
def test_only_what_is_named_gets_gradients_and_only_inside_the_layers(compressed, train):
    folder = compressed("gptq3", "mixtral") if train == "scales" else compressed("svd", "mixtral", "svd.ratio=0.3")
    model = moesvd_quant.load(folder)
    total = dict(model.named_parameters())
    trained = Trained(model, LAYERS, Lora(train=train), [], 0)
    lm_loss(model, IDS).backward()
    moving = {name for name, p in model.named_parameters() if p.grad is not None}
    assert moving == {name for name, p in model.named_parameters() if p.requires_grad} and len(moving) > 1
    assert len(moving) == len(trained.tensors())
    assert all(name.startswith("model.layers.") for name in moving)
    touched = {*trained.updates().left, *trained.updates().put}
    linears = {f"{layer}.self_attn.{name}_proj.weight" for layer in LAYERS for name in "qkvo"}
    banks = {name for name in total if ".experts." in name}
    routers = {f"{layer}.mlp.gate.weight" for layer in LAYERS}
    norms = {f"{layer}.{name}_layernorm.weight" for layer in LAYERS for name in ("input", "post_attention")}
    scales = {name for name in total if name.endswith("_scales")}
    assert touched == {"router": routers, "scales": scales | norms | routers}.get(train, banks | linears)


@pytest.mark.parametrize("train", ["adapters", "factors"])
def test_left_and_right_are_all_and_share_nothing(compressed, train):
    model = moesvd_quant.load(compressed("svd", "mixtral", "svd.ratio=0.3"))
    trained = Trained(model, LAYERS, Lora(train=train), [], 0)
    left, right = trained.tensors("left"), trained.tensors("right")
    assert not left.keys() & right.keys() and left.keys() | right.keys() == trained.tensors().keys()
    assert right and all("_right" in name for name in right) and not any("_right" in name for name in left)


def test_a_frozen_model_in_nf4_is_bitsandbytes_own_and_still_trains_after_an_evaluation(compressed):
    folder = compressed("svd", "mixtral", "svd.ratio=0.3")
    model, reference = moesvd_quant.load(folder), moesvd_quant.load(folder)
    linears, banks = float_targets(reference, LAYERS, attention=True)
    assert len(linears) == 8 and banks
    for name in [*(f"{path}.weight" for path in linears), *banks]:
        parameter = reference.get_parameter(name)
        parameter.data = dequantize_4bit(*quantize_4bit(parameter.data, quant_type="nf4"))
    freeze_in_nf4(model, linears, banks)
    with torch.no_grad():
        wanted = reference(IDS).logits
        assert torch.allclose(model(IDS).logits, wanted, atol=1e-5)
        assert not torch.allclose(moesvd_quant.load(folder)(IDS).logits, wanted, atol=1e-2)
    held = sum(t.untyped_storage().nbytes() for t in {id(p): p for p in model.model.layers.parameters()}.values())
    assert held < 0.3 * sum(p.nbytes for p in reference.model.layers.parameters())
    trained = Trained(model, LAYERS, Lora(), [], 0)
    lm_loss(model, IDS).backward()  # after a forward without gradients
    grads = {name: p.grad.norm() for name, p in trained.tensors().items() if name.endswith("lora_B.weight")}
    assert len(grads) == len(trained.adapters) > 12
    assert all(norm > 0 for norm in grads.values())
    plain = Trained(reference, LAYERS, Lora(), [], 0)
    lm_loss(reference, IDS).backward()
    for name, parameter in plain.tensors().items():
        assert torch.allclose(parameter.grad, trained.tensors()[name].grad, atol=1e-5), name


@pytest.mark.parametrize(
    "after,more",
    [
        ("{svd: {ratio: 0.8}}, ", {"objective": "distill"}),
        ("{svd: {ratio: 0.8}}, ", {"objective": "layerwise"}),
        ("{gptq: {bits: 2}}, ", {"objective": "distill", "train": "scales"}),
        ("{gptq: {bits: 2}}, ", {"objective": "layerwise", "train": "scales"}),
    ],
)
def test_learning_from_the_original_comes_nearer_to_it(make_model, heal, monkeypatch, text, after, more):
    """On text of the kind that was trained on, by the divergence that the test computes itself."""
    monkeypatch.setattr(lora_work, "validation_loss", lambda *_: next(losses))
    monkeypatch.setattr(trainer, "validations", lambda log: [(e["step"], -e["step"]) for e in log if "eval_loss" in e])
    losses, folder = iter([1.0, 0.9]), make_model("mixtral")
    before, after = heal(folder, after, steps=20, lr=0.005, validate_every=20, **more)
    ids = torch.tensor(tiny_tokenizer()(text.read_text()[:512]).input_ids).view(8, 64)
    with torch.no_grad():
        wanted, was, now = (moesvd_quant.load(f)(ids).logits.log_softmax(-1) for f in (folder, before, after))
    distance = [float(F.kl_div(x, wanted, reduction="sum", log_target=True)) for x in (was, now)]
    assert distance[1] < 0.8 * distance[0]


@pytest.mark.parametrize("architecture", ["gpt_oss", "deepseek_v2", "phimoe"])
def test_routers_and_targets_are_found_in_other_architectures(architecture):
    model = tiny_model(architecture)
    routers = router_parameters(model, LAYERS)
    assert len(routers) == {"gpt_oss": 4, "deepseek_v2": 1, "phimoe": 2}[architecture]
    assert all("router" in name or "gate" in name for name in routers)
    assert not any("gate_proj" in name or "gate_up" in name for name in routers)


def test_what_mambas_kernels_take_as_it_is_gets_no_adapter():
    """As PEFT has it, which refuses such a target by the model's name; ours has another."""
    model = tiny_architecture("nemotron_h")
    layers = _decoder_layers(model)[0]
    for path, native in list(find_experts(model)):
        model.set_submodule(path, FactorizedExperts(native, projections_of(native)))
    linears, _ = float_targets(model.get_submodule(layers), ["0", "1"], attention=True)
    assert "0.mixer.in_proj" in linears and "0.mixer.out_proj" not in linears
    Trained(model, [f"{layers}.0", f"{layers}.1"], Lora(), [], 0)


def test_router_healing_changes_routers_alone_even_of_a_packed_model(compressed, heal, monkeypatch):
    losses = iter([1.0, 0.9])
    monkeypatch.setattr(lora_work, "validation_loss", lambda *_: next(losses))
    before = compressed("gptq3", "mixtral")
    after = heal(before, train="router")
    was, now = (moesvd_quant.load(f).state_dict() for f in (before, after))
    assert was.keys() == now.keys()
    assert {name for name in was if not torch.equal(was[name], now[name])} == {f"{x}.mlp.gate.weight" for x in LAYERS}
    assert not (after / "adapter").exists()


def test_scales_are_trained_where_they_are_and_stored_as_they_were(compressed, heal, monkeypatch):
    losses = iter([1.0, 0.9])
    monkeypatch.setattr(lora_work, "validation_loss", lambda *_: next(losses))
    before = compressed("gptq3", "mixtral")
    after = heal(before, train="scales", lr=0.02)
    was, now = (moesvd_quant.load(f).state_dict() for f in (before, after))
    assert {name: (t.shape, t.dtype) for name, t in was.items()} == {
        name: (t.shape, t.dtype) for name, t in now.items()
    }
    changed = {name.rpartition(".")[2].rpartition("_")[2] for name in was if not torch.equal(was[name], now[name])}
    assert "scales" in changed and not changed & {"codes", "base", "zeros"}
    sizes = [sum(f.stat().st_size for f in folder.glob("*.safetensors")) for folder in (before, after)]
    assert sizes[0] == sizes[1]


def test_trained_scales_are_the_stored_ones_until_they_move():
    levels = torch.arange(256, dtype=torch.uint8)[None]
    form = Grid(3, 8, True)
    assert torch.equal(form.stored(form.trainable(levels)), levels)
    base = torch.tensor([0.7]).view(torch.int32)
    codes = pack(torch.randint(0, 8, (1, 256 * 8), dtype=torch.uint8), 3)
    given = levels, form.trainable(levels), form.trainable(levels) - math.log(2)
    stored, trained, doubled = (
        form.dequantize({"codes": codes, "scales": scales, "base": base}, (1, 2048), torch.float32) for scales in given
    )
    assert torch.allclose(stored, trained, rtol=1e-5)
    assert torch.allclose(doubled, 2 * stored, rtol=1e-5)


@pytest.mark.parametrize("objective,share", [("distill", 0.5), ("layerwise", 0.5), ("lm", 0.0)])
def test_what_the_model_wrote_of_the_calibration_is_learnt_from(
    make_model, tmp_path, small, monkeypatch, objective, share
):
    def heal(context, *_):
        seen.append(context.training.train)
        raise StageError("seen")

    seen: list[torch.Tensor] = []
    monkeypatch.setattr(lora_work, "heal_layerwise" if objective == "layerwise" else "heal_whole", heal)
    monkeypatch.setattr(windows, "written_windows", lambda *given: torch.full(given[3], 7))
    healing = f"{{lora: {{steps: 5, batch: 4, validation: 2, objective: {objective}}}}}"
    (tmp_path / "r.yaml").write_text(f"stages: [{{svd: {{ratio: 0.3}}}}, {healing}]")
    run = Run(
        load_recipe(tmp_path / "r.yaml", [*small, "calibration.self_written=0.5"]),
        make_model("mixtral"),
        tmp_path / "o",
    )
    with pytest.raises(StageError, match="seen"):
        run.run()
    assert len(seen[0]) == len(run.training(1).train) > 4
    assert float((seen[0] == 7).all(1).float().mean()) == pytest.approx(share, abs=0.5 / len(seen[0]))


def test_a_budget_passes_through_healing(make_model, tmp_path, small):
    healing = "{lora: {steps: 2, validation: 4, batch: 4}}, "
    plans = []
    for name, more in (("with", healing), ("without", "")):
        (tmp_path / "r.yaml").write_text(f"stages: [{{svd: {{}}}}, {more}{{gptq: {{}}}}]\nbudget: 2.5bpw")
        plans.append(plan_stages(Run(load_recipe(tmp_path / "r.yaml", small), make_model("mixtral"), tmp_path / name)))
    assert [p["stage"] for p in plans[0]] == ["svd", "lora", "gptq"]
    assert plans[0][-1]["layout"] == plans[1][-1]["layout"]


@pytest.mark.parametrize(
    "stages,said",
    [
        ("{gptq: {bits: 4}}, {lora: {train: factors}}", "lora.train: factors: this checkpoint's are packed"),
        ("{gptq: {bits: 4}}, {lora: {frozen: nf4}}", "lora.frozen: nf4: this checkpoint is packed already"),
        ("{gptq: {bits: 4}}, {lora: {}}, {lora: {}}", "has a low-rank term already"),
        ("{lora: {train: scales}}", "lora.train: scales: nothing is packed yet; put lora after gptq"),
        ("{lora: {objective: distill, batch: 4}}", "nothing is compressed yet; put lora after svd, d2 or gptq"),
    ],
)
def test_what_cannot_be_healed_is_said(make_model, tmp_path, small, stages, said):
    stages = stages.replace("lora: {", "lora: {steps: 2, validation: 2, ").replace(", }", "}")
    (tmp_path / "r.yaml").write_text(f"stages: [{stages}]")
    with pytest.raises(StageError, match=said):
        Run(load_recipe(tmp_path / "r.yaml", small), make_model("mixtral"), tmp_path / "o").run()


@pytest.mark.parametrize(
    "options,said",
    [
        ("batch: 10, microbatch: 4", "10 is not a multiple of microbatch 4"),
        ("rank: 12", "multiple of 8"),
        ("train: router, in_turn: true", "a router has no left and right factor"),
        ("train: scales, in_turn: true", "scales have no left and right factor"),
        ("train: factors, frozen: nf4", "frozen: nf4 needs train: adapters"),
        ("objectiv: lm", "did you mean 'objective'"),
    ],
)
def test_options_are_checked(tmp_path, options, said):
    (tmp_path / "r.yaml").write_text(f"stages: [{{lora: {{{options}}}}}]")
    with pytest.raises(RecipeError, match=said):
        load_recipe(tmp_path / "r.yaml")


def test_nothing_is_factorized_after_healing(tmp_path):
    (tmp_path / "r.yaml").write_text("stages: [{lora: {}}, {svd: {ratio: 0.4}}]")
    with pytest.raises(RecipeError, match="svd: cannot come after lora"):
        load_recipe(tmp_path / "r.yaml")


def test_the_record_says_what_was_done(compressed, heal):
    after = heal(compressed("svd", "mixtral", "svd.ratio=0.3"))
    record = json.loads((after / "healing.json").read_text())
    assert record["training_tokens"] == 6 * 4 * 64 and record["validation_tokens"] == 4 * 64
    assert json.loads((after / "moesvd.json").read_text())["notes"]["healing"] == record
    lines = (after / "loss.csv").read_text().splitlines()
    assert lines[0] == "phase,step,loss,learning_rate,validation_perplexity" and len(lines) == 1 + 1 + 6
    perplexities = [float(line.split(",")[4]) for line in lines[1:] if line.split(",")[4]]
    assert len(perplexities) == 3 and perplexities[0] == pytest.approx(record["validation_perplexity_before"], rel=1e-4)
    assert min(perplexities) == pytest.approx(record["validation_perplexity_after"], rel=1e-4)
    assert (after / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(after.rglob("*.pt")) and not (after / "training").exists()
    for _, experts in find_experts(moesvd_quant.load(after)):
        assert experts.layout
