"""The published configurations: Table 10's layers, a ratio of the whole model, layers and rank given directly."""

import json
import math
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig, PhimoeConfig

from moesvd_quant.checkpoint.accounting import account
from moesvd_quant.checkpoint.layout import layout_of
from moesvd_quant.model.experts import expert_count, find_experts, shapes_of
from moesvd_quant.model.opened import empty_model
from moesvd_quant.model.stream import StreamedModel
from moesvd_quant.planning.context import StageError
from moesvd_quant.planning.shares import kept_share
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.recipe.shipped import shipped
from moesvd_quant.run.run import Run
from moesvd_quant.stages.paper import plan_paper
from moesvd_quant.stages.svd import Svd

COUNTS = {  # of layers, read off Table 10
    "mixtral-8x7b": {20: 9, 30: 12, 40: 14, 50: 18, 60: 21},
    "phi-3.5-moe": {20: 8, 30: 10, 40: 14, 50: 17, 60: 19},
}
CONFIGS = {
    "mixtral-8x7b": MixtralConfig(hidden_size=4096, intermediate_size=14336, num_local_experts=8),
    "phi-3.5-moe": PhimoeConfig(hidden_size=4096, intermediate_size=6400, num_local_experts=16, attention_bias=True),
}


@cache
def parent(name):
    config = CONFIGS[name]
    config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads = 32, 32, 8
    config.vocab_size = {"mixtral-8x7b": 32000, "phi-3.5-moe": 32064}[name]
    return StreamedModel.described(empty_model(config, torch.bfloat16), Path(name))


@cache
def survey(name):
    found = {}
    for index, (layer, path) in enumerate(zip(parent(name).layers, parent(name).layer_names)):
        for inner, experts in find_experts(layer):
            count = expert_count(experts)
            entry = {"shapes": shapes_of(experts), "experts": count, "frequency": torch.arange(count) / count}
            found[f"{path}.{inner}"] = entry | {"layer": index, "sensitivity": 0.0}
    return found


def planned(name, stage):
    budget = int(kept_share(parent(name), stage.ratio, stage.ratio_of, survey(name)))
    layout = layout_of(parent(name))
    layout.experts, decisions = plan_paper(survey(name), budget, stage)
    return layout, decisions


@pytest.mark.parametrize("recipe", [name for name, _ in shipped() if "table10" in name])
def test_the_accountant_meets_a_ratio_of_the_whole_model_in_the_layers_of_table_10(recipe):
    name, _, ratio = recipe.removeprefix("models/").rpartition("-table10-")[0], *recipe.rpartition("-")[1:]
    (stage,) = load_recipe(recipe).stages
    layout, decisions = planned(name, stage)
    assert account(parent(name), layout).model_ratio == pytest.approx(int(ratio) / 100, abs=0.005)
    decomposed = {path: decision["ranks"] for path, decision in decisions.items() if decision["decomposed"]}
    assert [survey(name)[path]["layer"] for path in decomposed] == stage.layers
    assert len(stage.layers) == COUNTS[name][int(ratio)]
    # 2 m r + r n for each matrix (3.3), 4 m r + r n of Phi-3.5-MoE: the rank that the ratio leaves, by hand
    (inner, hidden), keep = survey(name)[next(iter(decomposed))]["shapes"]["gate"], stage.keep_u
    unit = 2 * (keep * inner + hidden) + keep * hidden + inner
    whole = len(stage.layers) * 3 * inner * hidden * {"mixtral-8x7b": 8, "phi-3.5-moe": 16}[name]
    total = {"mixtral-8x7b": 46.7e9, "phi-3.5-moe": 41.87e9}[name]
    rank = min((whole - int(ratio) / 100 * total) / len(stage.layers) / unit, hidden)
    found = [rank for ranks in decomposed.values() for rank in ranks.values()]
    assert sum(found) / len(found) == pytest.approx(rank, abs=16)


def test_table_10_at_60_percent_of_phi_cannot_be():
    """19 layers hold 57 % of the model: nothing of them left is not 60 % yet."""
    layers = [5, 6, 10, 11, 12, 13, 15, 16, 18, 19, 20, 21, 23, 24, 25, 26, 27, 28, 29]
    assert len(layers) == COUNTS["phi-3.5-moe"][60]
    stage = Svd(method="moe_svd", ratio=0.6, ratio_of="model", layers=layers, keep_u=4)
    said = r"svd.layers: these 19 layers can remove 0\.\d+ to 0\.59\d of the expert parameters, and 0\.62"
    with pytest.raises(StageError, match=said):
        planned("phi-3.5-moe", stage)


def test_a_rank_given_directly_is_the_rank_and_its_bytes(make_model, tmp_path, small):
    """`layers` and `rank` alone: no ratio, the parameters by hand."""
    given = ["svd.method=moe_svd", "svd.layers=[1]", "svd.rank=16", "svd.share=equation_8"]
    content = load_recipe("moe-svd-paper").model_dump()
    stages = [{"svd": {"method": "moe_svd", "layers": [1], "rank": 16, "share": "equation_8"}}]
    recipe = load_recipe({"calibration": content["calibration"], "stages": stages}, [*small, *given])
    (checkpoint,) = Run(recipe, make_model("mixtral"), tmp_path).run()
    found = json.loads((checkpoint / "moesvd.json").read_text())
    shapes = {"gate": (96, 64), "up": (96, 64), "down": (64, 96)}
    whole = 4 * sum(out * i for out, i in shapes.values())
    factors = sum(16 * (2 * out + i) for out, i in shapes.values())
    assert found["accounting"]["expert_params"] == whole + factors
    decomposed = [decision["ranks"] for decision in found["decisions"].values() if decision["decomposed"]]
    assert decomposed == [dict.fromkeys(shapes, 16)]


@pytest.mark.parametrize(
    "options,said",
    [
        (["svd.layers=[5]"], "svd.layers: 5: the model has 2 layers, from 0"),
        (["svd.layers=[0]", "svd.ratio=0.6"], r"svd.layers: these 1 layers can remove 0\.\d+ to 0\.4\d+"),
        (["svd.ratio=0.9", "svd.ratio_of=model"], r"ratio 0.9 of the model: all its experts are 0\.\d+; lower it"),
    ],
)
def test_what_cannot_be_is_said_by_its_key(options, said, make_model, tmp_path, small):
    with pytest.raises(StageError, match=said):
        Run(load_recipe("moe-svd-paper", [*small, *options]), make_model("mixtral"), tmp_path).run()


# On random weights the global allocation cuts whole ranks of few matrices: a percent is as near as it comes.
@pytest.mark.parametrize(
    "recipe,near", [("svd", 0.01), ("svd-llm", 0.005), ("moe-svd-paper", 0.005), ("d2-paper", 0.005)]
)
def test_every_method_meets_a_ratio_of_the_model(recipe, near, make_model, tmp_path, small):
    name = "d2" if recipe.startswith("d2") else "svd"
    given = [*small, f"{name}.ratio=0.12", f"{name}.ratio_of=model"]
    (checkpoint,) = Run(load_recipe(recipe, given), make_model("mixtral"), tmp_path).run()
    found = json.loads((checkpoint / "moesvd.json").read_text())["accounting"]
    assert found["model_ratio"] == pytest.approx(0.12, abs=near)
    stored = found["params"] / found["original_params"]
    assert math.isclose(1 - stored, found["model_ratio"])
