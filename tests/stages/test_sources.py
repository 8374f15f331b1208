"""Experts have an identity apart from their place: a stage drops the least used ones, and routers, statistics, bytes,
files, evaluation, export and report follow."""

import json
from contextlib import contextmanager
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import moesvd_quant
from moesvd_quant.checkpoint.layout import dense_layout, layout_of
from moesvd_quant.evaluation.flops import flops_per_token
from moesvd_quant.evaluation.inputs import EvalSpec
from moesvd_quant.evaluation.record import evaluate
from moesvd_quant.evaluation.report import write_report
from moesvd_quant.export.export import export_checkpoint
from moesvd_quant.model.experts import dense_weight, expert_count, find_experts, shapes_of
from moesvd_quant.model.folder import ModelError
from moesvd_quant.model.stream import StreamedModel
from moesvd_quant.planning.context import Context, Plan, factorized
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.recipe.stage import STAGES, Form, Stage, register
from moesvd_quant.run.plan import plan_stages
from moesvd_quant.run.run import Run
from moesvd_quant.runtime.modeling_moesvd import replace_experts
from moesvd_quant.runtime.routers import router_of

IDS = torch.randint(1, 250, (2, 40), generator=torch.Generator().manual_seed(5))
# DeepSeek-V3 has nine experts in three groups, of each of which one goes.
KEPT = {"mixtral": 3, "qwen2_moe": 4, "qwen3_moe": 4, "olmoe": 4, "gpt_oss": 3, "deepseek_v3": 6}


class Drop(Stage):
    """Keeps the experts that most tokens were sent to, as many in each group of the router."""

    name: ClassVar[str] = "busiest"
    takes: ClassVar[Form] = Form.ORIGINAL
    leaves: ClassVar[Form] = Form.CHANGED
    keep: list[int]  # of each layer with experts; the last number counts for all that follow

    def plan(self, context: Context) -> Plan:
        layout, at = layout_of(context.parent), 0
        for index, statistics in enumerate(context.statistics.layers()):
            layer, home = context.parent.layers[index], context.parent.layer_names[index]
            for path, experts in find_experts(layer):
                count = expert_count(experts)
                router = router_of(layer.get_submodule(path.rpartition(".")[0]), count)
                keep, at = self.keep[min(at, len(self.keep) - 1)], at + 1
                kept: list[int] = []
                for group in torch.arange(count).chunk(router.groups):
                    tokens = statistics[f"{path}/tokens"][group]
                    kept += group[tokens.argsort(descending=True, stable=True)[: keep // router.groups]].tolist()
                full = f"{home}.{path}"
                layout.sources[full] = [[expert] for expert in sorted(kept)]
                layout.experts[full] = dense_layout(keep, shapes_of(experts))
        return Plan(layout)

    def run_layer(self, context: Context, index: int, layer, statistics: dict, plan: Plan) -> dict:
        for path, native in list(find_experts(layer)):
            full = f"{context.parent.layer_names[index]}.{path}"
            sources = plan.layout.sources[full]
            banks = (
                (f"{name}_0_dense", at, dense_weight(native, name, expert))
                for name in shapes_of(native)
                for at, (expert,) in enumerate(sources)
            )
            replace_experts(layer, path, factorized(native, plan.layout.experts[full], banks, sources))
        return {}


@pytest.fixture(autouse=True)
def drop():
    yield register(Drop)
    del STAGES["busiest"]


def run(folder, out, small, keep, more=""):
    (out / "mine.yaml").write_text(f"stages: [{{busiest: {{keep: {keep}}}}}{more}]")
    return Run(load_recipe(out / "mine.yaml", [*small, "evaluate.perplexity=[]"]), folder, out / "out")


@contextmanager
def masked(model, sources):
    """Within it, routers give experts that are not among the sources no chance: their logits are minus infinity."""
    linear, patched = F.linear, []
    for path, kept in sources.items():
        experts = model.get_submodule(path)
        router = router_of(model.get_submodule(path.rpartition(".")[0]), expert_count(experts)).modules[0]
        gone = sorted(set(range(expert_count(experts))) - {group[0] for group in kept})
        bias = getattr(router, "e_score_correction_bias", None)
        if bias is not None:
            bias.data[gone] = -torch.inf

        def forward(hidden, real=router.forward, gone=gone, router=router):
            def without(*given):
                y = linear(*given)
                y[..., gone] = -torch.inf
                return y

            F.linear = without
            try:
                return real(hidden)
            finally:
                F.linear = linear

        router.forward = forward
        patched.append(router)
    yield
    for router in patched:
        del router.forward


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("architecture", sorted(KEPT))
def test_dropping_experts_is_masking_them_in_the_router(architecture, make_model, tmp_path, small):
    folder, keep = make_model(architecture), KEPT[architecture]
    job = run(folder, tmp_path, small, [keep], ", {gptq: {bits: 8}}")
    planned = plan_stages(job)
    first, second = job.run()
    for plan, checkpoint in zip(planned, (first, second)):
        assert plan["accounting"]["disk_bytes"] == sum(f.stat().st_size for f in checkpoint.glob("*.safetensors"))

    original, made = moesvd_quant.load(folder), moesvd_quant.load(first)
    sources = planned[0]["layout"]["sources"]
    with masked(original, sources):
        expected = logits(original)
    assert torch.allclose(logits(made), expected, atol=1e-5)
    assert (expected - logits(moesvd_quant.load(folder))).abs().max() > 1e-2  # experts matter
    streamed = torch.cat(list(StreamedModel(first).logits(IDS)))
    assert torch.allclose(streamed, expected, atol=1e-4)

    account = planned[0]["accounting"]
    assert account["params"] == sum(tensor.numel() for tensor in made.state_dict().values())
    assert account["expert_ratio"] == pytest.approx(1 - keep / expert_count(next(find_experts(original))[1]))
    assert flops_per_token(made, 8)["router"] < flops_per_token(moesvd_quant.load(folder), 8)["router"]

    export_checkpoint(first, tmp_path / "plain", "dense")  # opens without our package
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert "Moesvd" not in type(plain).__name__
    assert torch.allclose(logits(plain), expected, atol=1e-5)

    # GPTQ by the statistics of the experts that are left: near what it quantizes.
    quantized = moesvd_quant.load(second)
    assert (logits(quantized) - expected).abs().median() < 0.05 * expected.std()
    manifest = json.loads((second / "moesvd.json").read_text())
    errors = next(iter(value for path, value in manifest["errors"].items() if path in sources))
    assert len(errors["down"]) == keep


def test_layers_may_keep_different_numbers_of_experts(make_model, tmp_path, small):
    folder = make_model("qwen3_moe")
    job = run(folder, tmp_path, small, [3, 5], ", {gptq: {bits: 8, error_aware: true}}")
    first, second = job.run()
    sources = plan_stages(job)[0]["layout"]["sources"]
    assert [len(found) for found in sources.values()] == [3, 5]
    original = moesvd_quant.load(folder)
    with masked(original, sources):
        expected = logits(original)
    assert torch.allclose(logits(moesvd_quant.load(first)), expected, atol=1e-5)
    # Fitted in turn to the original's outputs: in 8 bits hardly anything is lost beside dropping.
    assert (logits(moesvd_quant.load(second)) - expected).std() < 0.5 * expected.std()
    assert evaluate(second, EvalSpec({"demo": "demo"}, length=64))["perplexity"]["demo"]["ppl"] > 0
    write_report(tmp_path / "out", tmp_path / "report.html")
    with pytest.raises(ModelError, match="layers have 3, 5 experts"):
        export_checkpoint(first, tmp_path / "plain", "dense")


@pytest.mark.parametrize(
    "architecture,keep,message",
    [("mixtral", 1, "a token is sent to 2 experts, and 1 would be left")],
)
def test_a_router_that_cannot_serve_is_refused(architecture, keep, message, make_model, tmp_path, small):
    with pytest.raises(ValueError, match=message):
        run(make_model(architecture), tmp_path, small, [keep]).run()
