"""Losses of truncated projections against transformers' own loss of models with those weights."""

import pytest
import torch

from moesvd_quant.calibration.truncation import truncation_losses
from moesvd_quant.model.experts import find_experts, split_projections
from moesvd_quant.model.stream import StreamedModel
from tiny import tiny_model

WINDOWS = torch.randint(1, 250, (3, 24), generator=torch.Generator().manual_seed(4))
RANKS = [4, 16]


def svd(weight):
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return u * s, v


def test_each_is_the_loss_of_the_model_with_one_projection_truncated(make_model):
    expected = {}
    with torch.no_grad():
        for path, _ in find_experts(tiny_model("mixtral")):
            for name in ("gate", "up", "down"):
                for rank in RANKS:
                    model = tiny_model("mixtral")
                    for weight in split_projections(model.get_submodule(path))[name]:
                        left, right = svd(weight)
                        weight.copy_(left[:, :rank] @ right[:rank])
                    loss = sum(float(model(ids[None], labels=ids[None]).loss) for ids in WINDOWS) / len(WINDOWS)
                    expected.setdefault((path, name), []).append(loss)
    streamed = StreamedModel(make_model("mixtral"))
    found = truncation_losses(
        streamed, WINDOWS, lambda index, path, name, weights: list(map(svd, weights)), lambda shape: RANKS, 2
    )
    assert found.keys() == expected.keys()
    for key, losses in expected.items():
        assert found[key] == pytest.approx(losses, rel=1e-4), key
        assert losses[0] != losses[1]
