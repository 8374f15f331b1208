"""A format is one class that says how matrices are stored, one that makes them so, and a registering line each."""

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM

import moesvd_quant
from moesvd_quant.evaluation.inputs import EvalSpec
from moesvd_quant.evaluation.paper_tables import table8
from moesvd_quant.evaluation.record import collect, evaluate, write
from moesvd_quant.evaluation.report import write_report
from moesvd_quant.evaluation.table import render
from moesvd_quant.export.export import export_checkpoint
from moesvd_quant.model.experts import find_experts
from moesvd_quant.model.folder import ModelError
from moesvd_quant.quantize.codec import Codec, PackedMatrix
from moesvd_quant.quantize.registry import CODECS, register_codec
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.recipe.recipe import RecipeError
from moesvd_quant.run.plan import plan_stages
from moesvd_quant.run.run import Run
from moesvd_quant.runtime.formats import FORMATS, Format, register
from moesvd_quant.runtime.packing import pack, unpack
from stranger import logits_without_package

IDS = torch.randint(1, 250, (2, 40), generator=torch.Generator().manual_seed(5))


@register
@dataclass(frozen=True)
class Sign(Format):
    """-1, 0 or 1 for each weight, in two bits, and a length for each row."""

    name: ClassVar[str] = "sign"
    trained: ClassVar[str | None] = "length"

    def tensors(self, shape, dtype):
        *lead, rows, columns = shape
        return {
            "codes": ((*lead, rows, -(-columns // 8) * 2), torch.uint8),
            "length": ((*lead, rows, 1), torch.int32),
        }

    def dequantize(self, stored, shape, dtype):
        length = stored["length"]
        length = length if length.is_floating_point() else length.view(torch.float32)
        return ((unpack(stored["codes"], 2, shape[1]).float() - 1) * length).to(dtype)

    def trainable(self, tensor):
        return tensor.view(torch.float32).clone()

    def stored(self, trained):
        return trained.float().contiguous().view(torch.int32)


class SignCodec(Codec):
    def form(self, rate, columns, bank="dense", pruned=False):
        return Sign()

    def noise(self, form):
        return 1 - 2 / torch.pi  # E(|x| - E|x|)^2 of a unit Gaussian

    def inputs(self, gram, form):
        return None

    def pack(self, weight, inputs, form):
        weight = weight.detach().float()
        length = weight.abs().mean(-1, keepdim=True)
        codes = (weight.sign() + 1).to(torch.uint8)
        return PackedMatrix({"codes": pack(codes, 2), "length": length.view(torch.int32)}, form, tuple(weight.shape))


@pytest.fixture(autouse=True)
def sign():
    register(Sign)
    register_codec("sign", (2,), SignCodec)
    yield
    del CODECS["sign"], FORMATS["sign"]


@pytest.fixture
def run(make_model, tmp_path, small):
    file = tmp_path / "mine.yaml"
    file.write_text("budget: 3bpw\nstages: [svd, {gptq: {format: sign}}]")
    return Run(load_recipe(file, small), make_model("mixtral", torch.bfloat16), tmp_path / "out")


def test_two_formats_or_codecs_of_one_name_are_refused():
    class Other(Sign):
        pass

    with pytest.raises(ValueError, match="two formats are named 'sign'"):
        register(Other)
    with pytest.raises(ValueError, match="two codecs are named 'sign'"):
        register_codec("sign", (2,), SignCodec)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_a_format_of_one_file_goes_through_everything(run, tmp_path):
    planned = plan_stages(run)
    first, second = run.run()
    for plan, folder in zip(planned, (first, second)):
        assert plan["accounting"]["disk_bytes"] == sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    manifest = json.loads((second / "moesvd.json").read_text())
    assert manifest["name"] == "svd-sign@3bpw" and manifest["accounting"]["bits_per_expert_weight"] <= 3

    model = moesvd_quant.load(second)
    for _, experts in find_experts(model):
        for name, bank in experts.banks():
            if bank.form == Sign():  # an independent truth: the values that a row of such a bank has
                row = experts.weight_rows(name, torch.float32, 0)[0]
                assert set((row / row.abs().max()).tolist()) <= {-1.0, 0.0, 1.0}
    expected = logits(model)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(second)), expected)
    done, found = logits_without_package(second, IDS, tmp_path)
    assert done.returncode == 0, done.stderr
    assert torch.equal(found, expected)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(moesvd_quant.load(tmp_path / "again")), expected)

    for checkpoint in (first, second):
        write(evaluate(checkpoint, EvalSpec({"demo": "demo"}, length=64)), checkpoint / "eval.json")
    assert "svd-sign@3bpw" in render(table8(collect([tmp_path / "out"])))
    write_report(tmp_path / "out", tmp_path / "report.html")
    assert "svd-sign@3bpw" in (tmp_path / "report.html").read_text()
    export_checkpoint(second, tmp_path / "dense", "dense")
    with pytest.raises(ModelError, match="is in format sign, and other software reads grids"):
        export_checkpoint(second, tmp_path / "gptq", "gptq")


def test_a_run_of_it_goes_on_where_it_was(run, tmp_path, monkeypatch):
    pack_, done = SignCodec.pack, []

    def stop(self, *given):
        done.append(1)
        if len(done) == 20:
            raise KeyboardInterrupt
        return pack_(self, *given)

    monkeypatch.setattr(SignCodec, "pack", stop)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    monkeypatch.setattr(SignCodec, "pack", pack_)
    resumed = Run(run.recipe, run.model, run.out).run()[-1]
    whole = Run(run.recipe, run.model, tmp_path / "whole").run()[-1]
    for file in whole.glob("*.safetensors"):
        assert file.read_bytes() == (resumed / file.name).read_bytes()


def test_what_of_it_can_be_trained_is_trained(make_model, tmp_path, small):
    file = tmp_path / "mine.yaml"
    lora = "{lora: {train: scales, objective: distill, steps: 4, batch: 4, validation: 4, validate_every: 2, lr: 0.02}}"
    file.write_text(f"stages: [{{gptq: {{format: sign, bits: 2}}}}, {lora}]")
    folder = make_model("mixtral")
    first, second = Run(load_recipe(file, [*small, "evaluate.perplexity=[]"]), folder, tmp_path / "out").run()
    if json.loads((second / "healing.json").read_text())["healed"]:
        was, now = (moesvd_quant.load(f).state_dict() for f in (first, second))
        changed = {name.rpartition("_")[2] for name in was if not torch.equal(was[name], now[name])}
        assert "length" in changed and "codes" not in changed


def test_recipes_check_formats_and_their_rates(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("stages: [{gptq: {format: sign, bits: 3}}]")
    with pytest.raises(RecipeError, match=r"gptq\.bits: 3 is none of the 2 bits of format sign"):
        load_recipe(file)
    file.write_text("stages: [{gptq: {format: signs, bits: 3}}]")
    with pytest.raises(RecipeError, match=r"gptq\.format: 'signs' is no known format \(grid, trellis, sign, best\)"):
        load_recipe(file)


def test_a_checkpoint_in_a_format_that_is_not_known_is_refused_by_name(run):
    checkpoint = run.run()[-1]
    del FORMATS["sign"]
    try:
        with pytest.raises(ModelError, match="format 'sign' of a matrix is none of float, grid, sparse"):
            moesvd_quant.load(checkpoint)
    finally:
        register(Sign)
