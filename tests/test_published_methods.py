"""The published methods as stages: the ratio that was asked for, groups, baselines, updates."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig

import moesvd_quant
from moesvd_quant.calibration.metric import Grams, shrink
from moesvd_quant.calibration.statistics import LayerRecorder
from moesvd_quant.checkpoint import accounting
from moesvd_quant.decompose.pruning import delta_rank, delta_ratio
from moesvd_quant.decompose.whitening import refit_left
from moesvd_quant.export.export import export_checkpoint
from moesvd_quant.model.experts import find_experts, split_projections
from moesvd_quant.model.folder import ModelError
from moesvd_quant.model.opened import empty_model
from moesvd_quant.model.stream import StreamedModel
from moesvd_quant.planning.context import Context, StageError
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.run.run import Run
from moesvd_quant.stages import svd_work
from moesvd_quant.stages.d2 import D2
from moesvd_quant.stages.paper import plan_paper
from moesvd_quant.stages.rank_rules import plan_own
from moesvd_quant.stages.svd import Svd


def make(recipe, folder, out, small, *overrides):
    return Run(load_recipe(recipe, [*small, *overrides]), folder, out)


# layers, experts, intermediate, hidden: of the paper's models, of the embedded one, and layers that differ
SHAPES = {
    "mixtral-8x7b": [(32, 8, 14336, 4096)],
    "phi-3.5-moe": [(32, 16, 6400, 4096)],
    "deepseek-moe-16b": [(27, 64, 1408, 2048)],
    "qwen2-57b-a14b": [(28, 64, 2560, 3584)],
    "reference": [(4, 8, 256, 192)],
    "mixed": [(3, 8, 512, 256), (2, 16, 128, 256), (1, 8, 384, 256)],
}


def survey(name):
    generator = torch.Generator().manual_seed(0)
    found = {}
    for layers, experts, inner, hidden in SHAPES[name]:
        for _ in range(layers):
            frequency = torch.rand(experts, generator=generator)
            found[f"layer{len(found)}"] = {
                "layer": len(found),
                "experts": experts,
                "shapes": {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)},
                "frequency": 2 * frequency / frequency.sum(),
                "sensitivity": float(torch.rand(1, generator=generator)),
            }
    return found


@pytest.mark.parametrize("model", SHAPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"trim_u": 0},
        {"groups": 4, "trim_u": 0},
        {"groups": 2, "keep_u": 2},
        {"share": "algorithm_3"},
        {"share": "equation_6"},
        {"share": "equation_8"},
        {"share": "equation_8", "groups": 4},
        {"share": "none"},
        {"method": "svd_llm"},
    ],
    ids=str,
)
def test_the_ratio_asked_for_is_met_within_half_a_percent(model, options):
    met = 0
    for ratio in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7):
        layers = survey(model)
        given = Svd(**({"method": "moe_svd", "ratio": ratio} | options))
        sizes = [e["experts"] * out * i for e in layers.values() for out, i in e["shapes"].values()]
        plan = plan_paper if given.method == "moe_svd" else partial(plan_own, None)
        try:
            layout, _ = plan(layers, int(sum(sizes) * (1 - ratio)), given)
        except StageError as error:
            assert "the nearest that can: 0." in str(error), error
            continue
        stored = sum(
            math.prod(bank.shape)
            for path, projections in layout.items()
            for name, parts in projections.items()
            for part in parts
            for bank in part.banks(*layers[path]["shapes"][name]).values()
        )
        assert -1e-9 < 1 - stored / sum(sizes) - ratio <= 0.005, ratio
        met += 1
    assert met >= 4


@pytest.mark.parametrize(
    "options,message",
    [
        ({"groups": 3}, "layer0: 8 experts do not part into groups: 3 equal ones"),
        ({"keep_u": 9}, "layer0: keep_u 9: a group has 8 experts; give 1 to 8"),
        ({"trim_u": 4, "groups": 2}, "layer0: trim_u 4: a group has 4 experts; give 0 to 3"),
        ({"ratio": 0.01}, r"ratio 0.01 cannot be had by .* of 4 layers; the nearest that can: 0\.0\d+$"),
        ({"select": "uniform"}, r"ratio 0\.2: factors shared in every layer remove at least 0\.667; raise it"),
    ],
)
def test_what_the_model_cannot_do_is_said(options, message):
    given = Svd(**({"method": "moe_svd", "ratio": 0.2} | options))
    total = 4 * 8 * 3 * 256 * 192
    with pytest.raises(StageError, match=message):
        plan_paper(survey("reference"), int(total * (1 - given.ratio)), given)


def test_groups_are_a_bank_of_right_factors_and_trimming_leaves_its_left_ones():
    """DeepSeekMoE: 64 experts, 8 groups, the 6 least used left factors of each trimmed."""
    layers = survey("deepseek-moe-16b")
    given = Svd(method="moe_svd", ratio=0.5, groups=8, trim_u=6)
    total = 27 * 64 * 3 * 1408 * 2048
    layout, decisions = plan_paper(layers, total // 2, given)
    path = next(path for path, decision in decisions.items() if len(decision["decomposed"]) == 3)
    (part,) = layout[path]["gate"]
    shapes = {name: bank.shape for name, bank in part.banks(1408, 2048).items()}
    assert shapes == {"left": (16, 1408, part.rank), "right": (8, part.rank, 2048)}
    assert part.right == [e // 8 for e in range(64)]


@pytest.mark.parametrize(
    "recipe,options",
    [
        ("svd-gptq4", ["svd.method=moe_svd", "svd.groups=2", "svd.trim_u=1"]),
        ("svd-gptq4", ["svd.method=moe_svd", "svd.share=equation_8"]),
        ("svd", ["svd.method=moe_svd", "svd.share=equation_6"]),
        ("svd", ["svd.method=moe_svd", "svd.share=none", "svd.select=owl"]),
        ("svd-plain", []),
        ("asvd", []),
    ],
    ids=str,
)
def test_checkpoints_of_each_method_load(recipe, options, make_model, tmp_path, small):
    for checkpoint in make(recipe, make_model("mixtral"), tmp_path, small, "svd.ratio=0.3", *options).run():
        found = json.loads((checkpoint / "moesvd.json").read_text())
        assert found["accounting"]["expert_ratio"] == pytest.approx(0.3, abs=0.01)
        with torch.no_grad():
            assert torch.isfinite(moesvd_quant.load(checkpoint)(torch.arange(40)[None]).logits).all()


def test_each_group_has_its_own_right_factor(make_model, tmp_path, small):
    options = ["svd.method=moe_svd", "svd.groups=2", "svd.keep_u=1", "svd.ratio=0.6"]
    (checkpoint,) = make("svd", make_model("mixtral"), tmp_path, small, *options).run()
    for _, experts in find_experts(moesvd_quant.load(checkpoint)):
        (part,) = experts.layout["gate"]
        assert part.right == part.left == [0, 0, 1, 1]
        dense = [experts.dense("gate", e) for e in range(4)]
        assert torch.equal(dense[0], dense[1]) and not torch.allclose(dense[1], dense[2])


def test_svd_llms_update_refits_to_the_inputs_that_compressed_layers_give(make_model, tmp_path, small):
    """The second layer's left factors solve the normal equations of a walk through the checkpoint's own first layer."""
    folder = make_model("mixtral")
    run = make("svd-llm", folder, tmp_path, small, "svd.update=true")
    (checkpoint,) = run.run()
    walk = StreamedModel(checkpoint, torch.float32).walk(run.windows, run.statistics.batch_size)
    original = StreamedModel(folder, torch.float32)
    for visit in walk:
        path, made = next(find_experts(visit.layer))
        native = dict(find_experts(original.load_layer(visit.index)))[path]
        weights = split_projections(native)["gate"]
        visit.layer.set_submodule(path, native)  # what the original layer sees behind compressed ones
        recorder = LayerRecorder(visit.layer)
        visit.run(visit.hidden)
        recorder.detach()
        visit.layer.set_submodule(path, made)
        ((_, seen),) = recorder.experts[path].groups()
        gram = Grams(seen["gram_in"], seen["tokens"], shrink)
        for i, part in enumerate(made.layout["gate"]):
            for at, e in enumerate(part.experts):
                left, right = (made.bank("gate", i, bank, torch.float64, at) for bank in ("left", "right"))
                best = refit_left([weights[e]], [gram[e]], [right])
                assert torch.allclose(left, best, rtol=1e-3, atol=1e-4 * float(best.abs().max()))


def test_an_interrupted_update_gives_the_same_files(make_model, tmp_path, small, monkeypatch):
    folder, layer = make_model("mixtral"), svd_work.run_layer

    def stop_at_the_second(context, options, index, *rest):
        if index == 1:
            raise KeyboardInterrupt
        return layer(context, options, index, *rest)

    (whole,) = make("svd-llm", folder, tmp_path / "whole", small, "svd.update=true").run()
    monkeypatch.setattr(svd_work, "run_layer", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        make("svd-llm", folder, tmp_path / "parts", small, "svd.update=true").run()
    monkeypatch.setattr(svd_work, "run_layer", layer)
    (parts,) = make("svd-llm", folder, tmp_path / "parts", small, "svd.update=true").run()
    for file in sorted(whole.glob("*.safetensors")):
        assert file.read_bytes() == (parts / file.name).read_bytes()


PRUNED = ["d2.ratio=0.4", "d2.static=0.25", "d2.dynamic=0.25"]


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
def test_a_pruned_base_is_stored_small_quantized_and_counted_exactly(architecture, make_model, tmp_path, small):
    folder = make_model(architecture)
    run = make("d2-gptq4", folder, tmp_path, small, *PRUNED, "gptq.bits=8", "gptq.attention=false")
    first, second = run.run()
    inner = 96 if architecture == "mixtral" else 64
    ids = run.windows[:4]
    outputs = []
    for checkpoint in (folder, first, second):
        model = moesvd_quant.load(checkpoint, dtype=torch.float32)
        with torch.no_grad():
            outputs.append(model(ids).logits)
        for _, experts in find_experts(model) if checkpoint != folder else ():
            assert experts.layout["down"][0].columns == len(experts.channels) == inner * 3 // 4
            assert experts.layout["up"][0].dynamic == inner // 2 and experts.layout["gate"][0].dynamic is None
            assert experts.channels.dtype == experts.channel_prior.dtype == torch.int32
    # Rounding in 8 bits moves little, but for channels near the edge of a token's choice, which may change places.
    assert 0 < (outputs[2] - outputs[1]).norm() < 0.15 * (outputs[1] - outputs[0]).norm()
    for checkpoint in (first, second):
        account = json.loads((checkpoint / "moesvd.json").read_text())["accounting"]
        tensors = [t for file in checkpoint.glob("*.safetensors") for t in load_file(file).values()]
        assert account["tensor_bytes"] == sum(t.numel() * t.element_size() for t in tensors)
        assert account["expert_ratio"] == pytest.approx(0.4, abs=0.01)
    found = json.loads((first / "moesvd.json").read_text())["decisions"]
    assert next(iter(found.values()))["base channels"] == {"stored": inner * 3 // 4, "used": inner // 2}


def test_a_base_without_pruning_is_the_limit_of_a_pruned_one(make_model, tmp_path, small):
    """A dynamic share too small to leave out a channel changes nothing."""
    folder, outputs = make_model("mixtral"), []
    for name, dynamic in (("a", 0.0), ("b", 0.004)):
        (checkpoint,) = make("d2-paper", folder, tmp_path / name, small, f"d2.dynamic={dynamic}").run()
        with torch.no_grad():
            outputs.append(moesvd_quant.load(checkpoint)(torch.arange(200).view(4, 50)).logits)
    assert torch.allclose(*outputs, atol=1e-4)


def test_dynamic_pruning_has_no_dense_form_and_static_has_an_exact_one(make_model, tmp_path, small):
    folder, ids = make_model("mixtral"), torch.arange(200).view(4, 50)
    (static,) = make("d2-paper", folder, tmp_path / "s", small, "d2.static=0.25").run()
    export_checkpoint(static, tmp_path / "dense", "dense")
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")(ids).logits
        assert torch.allclose(plain, moesvd_quant.load(static)(ids).logits, atol=2e-4)
    (dynamic,) = make("d2-paper", folder, tmp_path / "d", small, *PRUNED).run()
    with pytest.raises(ModelError, match=r"mlp\.experts: each token chooses channels of the base .*no dense weight"):
        export_checkpoint(dynamic, tmp_path / "none", "dense")
    assert not (tmp_path / "none").exists()
    with pytest.raises(ModelError, match=r"each token chooses channels .*in one recipe on the original model"):
        make("gptq4", dynamic, tmp_path / "again", small).run()


TABLE_12 = {
    "performance": (0.05, [68.05, 47.34, 26.62, 16.26, 5.93]),
    "throughput": (0.3, [74.3, 53.58, 32.86, 22.54, 12.18]),
}


@pytest.mark.parametrize("name", TABLE_12)
def test_the_published_thresholds_of_d2_come_out_of_its_ratios_and_lead_back_to_the_same_ranks(name):
    """At 20, 40, 60, 70, 80 % of the model, both halves of the pruning counted; to a step of rank, 0.13 points."""
    half, thresholds = TABLE_12[name]
    parent = mixtral()
    for ratio, threshold in zip((0.2, 0.4, 0.6, 0.7, 0.8), thresholds):
        given = D2(ratio=ratio, ratio_of="model", count="used", static=half, dynamic=half)
        solved = given.plan(Context(parent, None, Svd(), 0, torch.device("cpu")))
        found = [d["delta_ratio"][name] for d in solved.decisions.values() for name in ("gate", "up", "down")]
        assert 100 * sum(found) / len(found) == pytest.approx(threshold, abs=0.15)
        direct = D2(delta_ratio=threshold / 100, static=half, dynamic=half)
        made = direct.plan(Context(parent, None, Svd(), 0, torch.device("cpu")))
        (rank,) = {rank for d in made.decisions.values() for ranks in d["ranks"].values() for rank in ranks}
        assert rank % 8 == 0 and abs(rank - threshold / 100 * 14336 * 4096 / (14336 + 4096)) <= 4


def mixtral():
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_local_experts": 8}
    config = MixtralConfig(**shape, num_attention_heads=32, num_key_value_heads=8, vocab_size=32000)
    return StreamedModel.described(empty_model(config, torch.float32), Path("mixtral-8x7b"))


@pytest.mark.parametrize("merge", ["regmean", "ties"])
def test_bases_of_other_merges_run_and_deltas_make_up_for_them(merge, make_model, tmp_path, small):
    folder = make_model("mixtral")
    given = ["d2.ratio=null", "d2.delta_ratio=0.99", f"d2.merge={merge}"]
    (checkpoint,) = make("d2-paper", folder, tmp_path, small, *given).run()
    found = json.loads((checkpoint / "moesvd.json").read_text())
    (rank,) = {rank for d in found["decisions"].values() for ranks in d["ranks"].values() for rank in ranks}
    assert rank == 40  # 0.99 * 96 * 64 / 160 is 38
    errors = [value for found in found["errors"].values() for name in ("gate", "up", "down") for value in found[name]]
    assert 0 < sum(errors) / len(errors) < 0.5


@pytest.mark.parametrize("ratio", [0.2, 0.6])
def test_the_plan_of_mixtral_8x7b_is_the_accounting_of_the_paper(ratio):
    """Throughput settings at real shapes, on the meta device: only the static half counts as removed."""
    parent = mixtral()
    made = D2(ratio=ratio, static=0.3, dynamic=0.3).plan(Context(parent, None, Svd(), 0, torch.device("cpu")))
    account = accounting.account(parent, made.layout)
    assert account.original_params == pytest.approx(46.703e9, rel=1e-4)
    assert account.expert_ratio == pytest.approx(ratio, abs=1e-4)
    base, unit = 32 * 3 * 4096 * 14336, 32 * 8 * 3 * (4096 + 14336)
    rank = delta_rank(account.params, account.params - account.expert_params, base, 1 - 10032 / 14336, unit)
    found = [d["delta_ratio"][name] for d in made.decisions.values() for name in ("gate", "up", "down")]
    assert sum(found) / len(found) == pytest.approx(delta_ratio(rank, (14336, 4096)), abs=1e-3)
    assert next(iter(made.decisions.values()))["base channels"] == {"stored": 10032, "used": 5734}
