"""Layer-wise healing holds one layer of each model: the memory of the process, sampled while it is under way."""

import math

import pytest
from safetensors import safe_open

from moesvd_quant.memory.allocator import disable_malloc_cache
from moesvd_quant.memory.limits import PeakMeter
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.run.run import Run

HIDDEN, WIDE, LAYERS, EXPERTS = 256, 1024, 8, 8
WINDOWS, LENGTH = 12, 32
SVD = "svd: {method: svd_llm, ratio: 0.4}"


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("train", ["adapters", "factors"])
def test_the_peak_is_at_most_three_layers_and_activations(make_model, compressed, heal, tmp_path, text, train):
    disable_malloc_cache()  # as the command line does
    heal(compressed("svd", "mixtral", "svd.ratio=0.3"), steps=1)  # imports what healing needs
    shape = dict(num_hidden_layers=LAYERS, num_local_experts=EXPERTS, hidden_size=HIDDEN, intermediate_size=WIDE)
    folder = make_model("mixtral", **shape)
    stage = f"lora: {{objective: layerwise, train: {train}, steps: 3, batch: 8, validation: 4, rank: 8}}"
    overrides = [f"calibration.dataset={text}", f"calibration.samples={WINDOWS}", f"calibration.length={LENGTH}"]

    def run(stages: str):
        (tmp_path / "r.yaml").write_text(f"stages: [{stages}]")
        return Run(load_recipe(tmp_path / "r.yaml", [*overrides, "evaluate.perplexity=[]"]), folder, tmp_path / "out")

    run(f"{{{SVD}}}").run()
    healing = run(f"{{{SVD}}}, {{{stage}}}")
    with PeakMeter(0.001) as meter:
        healing.run()
    with safe_open(folder / "model.safetensors", "pt") as stored:
        sizes = {name: 4 * math.prod(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118 - a file, not a mapping
    layer = sum(size for name, size in sizes.items() if ".layers.0." in name)
    outer = sum(size for name, size in sizes.items() if ".layers." not in name)
    states = 4 * HIDDEN * LENGTH * WINDOWS
    under_way = 4 * 8 * LENGTH * 2 * 8 * (WIDE + HIDDEN)  # what autograd keeps of a batch, two experts a token
    # the embeddings of both models; hidden states of both, inputs and outputs
    allowed = 3 * layer + 2 * outer + 4 * states + under_way
    assert meter.peak - meter.start <= allowed
    assert LAYERS * layer > 1.5 * allowed  # into which the original would not fit
