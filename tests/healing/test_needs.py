"""What healing is forecast to need, against what it takes, on a model whose weights are most of it."""

import gc
import json

import pytest
from safetensors.torch import load_file, save_file

from moesvd_quant.evaluation.benchmarks.synthetic import synthetic
from moesvd_quant.healing.needs import HealingNeeds
from moesvd_quant.memory.allocator import disable_malloc_cache, malloc_trim
from moesvd_quant.memory.limits import MemoryLimitError, PeakMeter
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.run.run import Run
from moesvd_quant.stages import lora_work
from moesvd_quant.stages.lora import Lora

SHAPE = dict(hidden_size=512, num_attention_heads=8, num_key_value_heads=8, intermediate_size=1792)
SVD, GPTQ = "{svd: {ratio: 0.4, method: svd_llm}}", "{gptq: {bits: 3, rtn: true}}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """In bf16: what is stored in float32 is mapped from its file, and no memory of the process."""
    made = synthetic(tmp_path_factory.mktemp("models") / "mixtral", "mixtral", 2, **SHAPE)
    for path in made.glob("*.safetensors"):
        save_file({k: v.bfloat16() for k, v in load_file(path).items()}, path, metadata={"format": "pt"})
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    return made


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    "before,more,off",
    [
        (SVD, "train: adapters", 0.1),
        (SVD, "objective: distill", 0.1),
        (SVD, "train: factors", 0.1),
        (SVD, "checkpointing: false", 0.1),
        (SVD, "frozen: nf4", 0.1),
        (SVD, "objective: layerwise", 0.2),
        (GPTQ, "rank: 8", 0.1),
        (GPTQ, "train: scales", 0.1),
    ],
)
def test_the_peak_is_forecast(folder, tmp_path, text, monkeypatch, before, more, off):
    disable_malloc_cache()  # as the command line does
    overrides = [f"calibration.dataset={text}", "calibration.samples=16", "calibration.length=256"]
    stage = f"{{lora: {{steps: 3, batch: 4, validation: 4, {more}}}}}"
    (tmp_path / "r.yaml").write_text(f"stages: [{before}, {stage}]")
    heal, peaks = lora_work._heal, []

    def measured(*given):
        gc.collect()
        malloc_trim()
        with PeakMeter(0.002) as meter:
            heal(*given)
        peaks.append(meter.peak - meter.start)

    monkeypatch.setattr(lora_work, "_heal", measured)
    run = Run(load_recipe(tmp_path / "r.yaml", [*overrides, "evaluate.perplexity=[]"]), folder, tmp_path / "out")
    run.run()
    needs = HealingNeeds(**run.forecasts[-1]["notes"]["needs"])
    assert peaks == [pytest.approx(needs.memory, rel=off)]


def test_what_cannot_fit_is_refused_with_what_would(tmp_path):
    needs = HealingNeeds(weights=8 * 10**9, trained=10**9, working=10**9, disk=0)
    needs.require(10**10, tmp_path, Lora())
    with pytest.raises(
        MemoryLimitError, match=r"takes 10.00 GB .* 9.00 GB are free; .* objective: layerwise, frozen: nf4"
    ):
        needs.require(9 * 10**9, tmp_path, Lora())
    with pytest.raises(MemoryLimitError, match="what takes less: train: adapters, a shorter length"):
        needs.require(1, tmp_path, Lora(train="factors", objective="layerwise", microbatch=1, batch=4))
    with pytest.raises(MemoryLimitError, match=rf"1000000.00 GB of hidden states under {tmp_path}.* set MOESVD_CACHE"):
        HealingNeeds(weights=1, trained=1, working=1, disk=10**15).require(10**10, tmp_path, Lora())


def test_a_run_that_could_not_heal_is_refused_before_anything_is_compressed(make_model, tmp_path, small):
    (tmp_path / "r.yaml").write_text("stages: [{svd: {ratio: 0.3}}, {lora: {steps: 2, batch: 4, validation: 4}}]")
    run = Run(load_recipe(tmp_path / "r.yaml", small), make_model("mixtral"), tmp_path / "out")
    run.statistics.ensure()
    run.statistics.memory.limit = 1
    with pytest.raises(MemoryLimitError, match="lora: healing takes"):
        run._forecasts()
    assert not list(tmp_path.glob("out/*"))
