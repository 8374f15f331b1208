"""Layer-wise healing holds one layer of each model: counted while it is under way."""

import gc

import pytest
import torch

from moesvd_quant.healing import layerwise
from moesvd_quant.model.stream import StreamedModel
from moesvd_quant.recipe import load_recipe
from moesvd_quant.runner import Run

HIDDEN, WIDE = 128, 512


def alive() -> int:
    """Bytes of all tensors, each storage once."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.device.type == "cpu"]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.slow
def test_the_peak_is_at_most_three_layers_and_activations(make_model, tmp_path, text, monkeypatch):
    folder = make_model("mixtral", num_hidden_layers=6, num_local_experts=8, hidden_size=HIDDEN, intermediate_size=WIDE)
    (tmp_path / "r.yaml").write_text(
        "stages: [{svd: {ratio: 0.4}}, {lora: {objective: layerwise, steps: 2, batch: 8, validation: 4, rank: 8}}]"
    )
    overrides = [f"calibration.dataset={text}", "calibration.samples=8", "calibration.length=16"]
    seen: list[int] = []

    loss = layerwise.output_error

    def counting(given, wanted):
        seen.append(alive())
        return loss(given, wanted)

    monkeypatch.setattr(layerwise, "output_error", counting)
    run = Run(load_recipe(tmp_path / "r.yaml", overrides), folder, tmp_path / "out")
    before = alive()
    run.run()
    original = StreamedModel(folder)
    layer = sum(p.numel() * 4 for p in original.decoder.layers[0].parameters())
    outer = sum(p.numel() * 4 for n, p in original.model.named_parameters() if ".layers." not in n)
    states = 4 * HIDDEN * run.training(1).train.numel()
    under_way = 4 * 8 * 16 * 2 * 8 * (WIDE + HIDDEN)  # what autograd keeps of a batch, two experts a token
    assert len(seen) == 2 * 6
    # the embeddings of both models; hidden states of both, inputs and outputs
    assert max(seen) - before <= 3 * layer + 2 * outer + 4 * states + under_way
    assert 6 * layer > 3 * layer + 2 * outer + 4 * states + under_way  # into which the whole original would not fit
    assert seen[-1] - seen[5] < 0.5 * layer  # nothing piles up
