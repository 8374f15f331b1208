"""A stage is one class in one file and one registering line; what it says of itself is all that others know."""

import json
import subprocess
import sys
from typing import ClassVar

import pytest
import torch

import moesvd_quant
from moesvd_quant.checkpoint.layout import layout_of
from moesvd_quant.evaluation.inputs import EvalSpec
from moesvd_quant.evaluation.paper_tables import table8
from moesvd_quant.evaluation.record import collect, evaluate, write
from moesvd_quant.evaluation.report import write_report
from moesvd_quant.evaluation.table import render
from moesvd_quant.model.experts import expert_count, find_experts, shapes_of, split_projections
from moesvd_quant.planning.context import Context, Plan, factorized
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.recipe.recipe import RecipeError
from moesvd_quant.recipe.stage import STAGES, Form, Stage, register
from moesvd_quant.run.plan import plan_stages
from moesvd_quant.run.run import Run
from moesvd_quant.runtime.parts import DensePart


class Average(Stage):
    """The whole of an example stage: neighbouring experts become their mean, so many at a time."""

    name: ClassVar[str] = "average"
    takes: ClassVar[Form] = Form.ORIGINAL
    leaves: ClassVar[Form] = Form.CHANGED
    group: int = 2

    def label(self) -> str:
        return f"average{self.group}"

    def plan(self, context: Context) -> Plan:
        layout = layout_of(context.parent)
        for layer, home in zip(context.parent.layers, context.parent.layer_names):
            for path, experts in find_experts(layer):
                every = list(range(expert_count(experts)))
                rows = [expert // self.group for expert in every]
                layout.experts[f"{home}.{path}"] = {name: [DensePart(every, rows)] for name in shapes_of(experts)}
        return Plan(layout, notes={"experts averaged": self.group})

    def run_layer(self, context: Context, index: int, layer, statistics: dict, plan: Plan) -> dict:
        for path, native in list(find_experts(layer)):
            weights = split_projections(native)
            means = {name: torch.stack([w.mean(0) for w in own.split(self.group)]) for name, own in weights.items()}
            layout = plan.layout.experts[f"{context.parent.layer_names[index]}.{path}"]
            banks = ((f"{name}_0_dense", None, mean) for name, mean in means.items())
            layer.set_submodule(path, factorized(native, layout, banks))
        return {}


@pytest.fixture
def example():
    yield register(Average)
    del STAGES["average"]


def test_a_stage_of_one_file_goes_through_everything(example, make_model, tmp_path, small):
    folder = make_model("mixtral")
    file = tmp_path / "mine.yaml"
    file.write_text("stages: [average, {gptq: {bits: 4}}]")
    recipe = load_recipe(file, [*small, "evaluate.perplexity=[]", "average.group=4"])
    run = Run(recipe, folder, tmp_path / "out")
    planned = plan_stages(run)
    first, second = run.run()
    assert [p["accounting"]["disk_bytes"] for p in planned] == [
        sum(f.stat().st_size for f in folder.glob("*.safetensors")) for folder in (first, second)
    ]
    manifest = json.loads((second / "moesvd.json").read_text())
    assert manifest["name"] == "average4-gptq4" and manifest["stages"][0] == {"average": {"group": 4}}

    # An independent truth: the mean of four experts of the original, by the class that transformers has for them.
    original, made = moesvd_quant.load(folder), moesvd_quant.load(first)
    native = original.model.layers[0].mlp.experts
    gate_up = native.gate_up_proj[:4].mean(0)
    got = torch.cat([made.model.layers[0].mlp.experts.dense(name, 2) for name in ("gate", "up")])
    assert torch.allclose(got, gate_up.float(), rtol=1e-2, atol=1e-3)

    assert Run(recipe, folder, tmp_path / "out").run() == [first, second]  # a finished run is not made again
    for checkpoint in (first, second):
        write(evaluate(checkpoint, EvalSpec({"demo": "demo"}, length=64)), checkpoint / "eval.json")
    assert "average4-gptq4" in render(table8(collect([tmp_path / "out"])))
    write_report(tmp_path / "out", tmp_path / "report.html")
    assert "average4-gptq4" in (tmp_path / "report.html").read_text()


def test_options_of_a_new_stage_are_checked_by_recipes(example, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("stages: [{average: {grup: 2}}]")
    with pytest.raises(RecipeError, match=r"mine.yaml:1: stages\[0\].average.grup: unknown key; did you mean 'group'"):
        load_recipe(file)
    file.write_text("stages: [{gptq: {bits: 4}}, average]")
    with pytest.raises(RecipeError, match="average: cannot come after gptq"):
        load_recipe(file)


def test_a_misspelt_hook_is_refused():
    with pytest.raises(TypeError, match=r"Wrong.run_outter: .* did you mean 'run_outer'\?"):

        class Wrong(Stage):
            name: ClassVar[str] = "wrong"

            def run_outter(self, context, plan):
                return {}


def test_a_stage_that_lacks_its_work_says_so():
    class Empty(Stage):
        name: ClassVar[str] = "empty"
        takes: ClassVar[Form] = Form.ORIGINAL
        leaves: ClassVar[Form] = Form.CHANGED

    with pytest.raises(NotImplementedError, match=r"Empty\.plan"):
        Empty().plan(None)


def test_recipes_are_checked_without_torch():
    code = "import sys; import moesvd_quant.recipe.load as r; r.load_recipe('fit'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_two_stages_of_one_name_are_refused(example):
    class Other(Average):
        pass

    with pytest.raises(ValueError, match="two stages are named 'average'"):
        register(Other)
    assert register(example) is Average
