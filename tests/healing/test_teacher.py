"""The original's predictions from what its last layer put out, against those of the whole model."""

import pytest
import torch

from architectures import tiny_architecture
from moesvd_quant.healing import teacher
from moesvd_quant.healing.rounding import BATCH
from moesvd_quant.healing.teacher import predictions
from moesvd_quant.model.stream import StreamedModel

WINDOWS = torch.randint(1, 250, (BATCH + 3, 24), generator=torch.Generator().manual_seed(3))


# logits scaled; capped, with keys shared by layers; layers that hand on router states; a composite model
@pytest.mark.parametrize("name", ["granitemoe", "gemma4_text", "zaya", "qwen3_vl_moe"])
def test_any_windows_in_any_order_are_predicted_as_by_the_whole_model(name, make_architecture, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher, "WINDOWS", BATCH + 1)  # two walks
    done, drawn = [], torch.tensor([9, 2, 2, 0, 10])
    with torch.no_grad():
        wanted = tiny_architecture(name)(input_ids=WINDOWS[drawn], use_cache=False).logits
    streamed = StreamedModel(make_architecture(name))
    with predictions(streamed, WINDOWS, tmp_path, lambda *step: done.append(step)) as predict:
        assert torch.allclose(predict(drawn, WINDOWS[drawn]), wanted, atol=1e-4 * float(wanted.abs().max()))
        held = {n for n, p in streamed.model.named_parameters() if p.device.type != "meta"}
        assert not [n for n in held if any(n.startswith(f"{layer}.") for layer in streamed.layer_names)]
    assert done[-1] == (2 * len(streamed.layer_names),) * 2
    assert list(tmp_path.iterdir()) == []
