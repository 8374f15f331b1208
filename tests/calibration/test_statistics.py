"""Statistics of a layer against hooks-free recomputation from the native modules' own formulas."""

import pytest
import torch
from tiny import ARCHITECTURES
from transformers import AutoModelForCausalLM

from moesvd_quant.calibration.statistics import LayerRecorder, coverage, outlier_share, shrink
from moesvd_quant.calibration.store import linear_gram
from moesvd_quant.model.experts import find_experts, split_projections
from moesvd_quant.model.stream import StreamedModel

WINDOWS = torch.randint(1, 250, (6, 32), generator=torch.Generator().manual_seed(4))


def walk(folder):
    """({layer: statistics}, hidden states after the walk)."""
    streamed, found = StreamedModel(folder), []
    for visit in streamed.walk(WINDOWS, 4):
        recorder = LayerRecorder(visit.layer)
        visit.outputs()
        found.append(recorder.detach() | {f"{k}/alias": v for k, v in recorder.aliases.items()})
    return found, torch.cat(streamed.hidden)


def native_calls(folder):
    """Arguments of every call of every experts module, and the final hidden states, of the model in memory."""
    model, calls = AutoModelForCausalLM.from_pretrained(folder).eval(), {}
    for path, module in list(find_experts(model)):
        calls[path] = (module, [])
        module.register_forward_pre_hook(lambda _, args, path=path: calls[path][1].append(args))
    norm = {}
    model.get_decoder().norm.register_forward_pre_hook(lambda _, args: norm.update(x=args[0]))
    with torch.no_grad():
        model(WINDOWS)
    return calls, norm["x"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_recording_does_not_change_the_walk_and_counts_are_the_routers(architecture, make_model):
    statistics, hidden = walk(make_model(architecture))
    calls, expected = native_calls(make_model(architecture))
    assert torch.allclose(hidden, expected, atol=1e-4)
    for path, (_, recorded) in calls.items():
        layer, inside = int(path.split(".")[2]), path.split(".", 3)[3]
        index = torch.cat([args[1] for args in recorded])
        tokens = statistics[layer][f"{inside}/tokens"]
        assert torch.equal(tokens, torch.bincount(index.flatten(), minlength=len(tokens)))


def test_gram_matrices_are_sums_over_each_experts_tokens(make_model):
    statistics, _ = walk(make_model("mixtral"))
    calls, _ = native_calls(make_model("mixtral"))
    module, recorded = calls["model.layers.1.mlp.experts"]
    hidden, index = torch.cat([args[0] for args in recorded]), torch.cat([args[1] for args in recorded])
    weights = {name: weight.detach().double() for name, weight in split_projections(module).items()}
    for expert in range(4):
        x = hidden[(index == expert).any(1)].double()
        inner = torch.nn.functional.silu(x @ weights["gate"][expert].T)
        inner = inner * (x @ weights["up"][expert].T)
        for name, value in (("gram_in", x), ("gram_mid", inner)):
            expected = value.T @ value
            got = statistics[1][f"mlp.experts/{name}"][expert].double()
            assert torch.allclose(got, expected, atol=1e-4 * float(expected.abs().max()))
        share = (inner.abs() > 2 * inner.abs().mean()).double().mean()
        got = outlier_share(statistics[1]["mlp.experts/magnitudes"], statistics[1]["mlp.experts/magnitude_sum"], 2.0)
        assert float(got[expert]) == pytest.approx(float(share), rel=0.03)


def test_linears_that_read_one_tensor_share_a_gram_matrix(make_model):
    statistics, _ = walk(make_model("qwen3_moe"))
    layer = statistics[0]
    assert layer["self_attn.k_proj/alias"] == layer["self_attn.v_proj/alias"] == "self_attn.q_proj"
    assert "self_attn.o_proj/gram" in layer
    stored = {k: v for k, v in layer.items() if isinstance(v, torch.Tensor)}
    assert linear_gram(stored, "self_attn.o_proj").shape == (64, 64)


def test_every_token_passes_the_shared_expert(make_model):
    statistics, _ = walk(make_model("qwen2_moe"))
    assert int(statistics[0]["mlp.shared_expert.down_proj/tokens"]) == WINDOWS.numel()


def test_shrink_moves_unseen_experts_to_the_layer_and_leaves_seen_ones():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.tensor([40000, 20000, 0, 1])
    grams = []
    for count in tokens.tolist():
        x = torch.randn(count, 6, generator=generator, dtype=torch.float64)
        grams.append(x.T @ x)
    gram = torch.stack(grams)
    shrunk = shrink(gram, tokens)
    pooled = gram.sum(0) / tokens.sum()
    assert torch.allclose(shrunk[2], 6 * pooled)  # as if it had seen six tokens of the layer
    assert torch.allclose(shrunk[0], gram[0], rtol=1e-2, atol=20)
    assert torch.linalg.eigvalsh(shrunk).min() > 0
    assert coverage(tokens, 6) == {"none": [2, 3], "few": []}
    with pytest.raises(ValueError, match="no calibration token"):
        shrink(gram, torch.zeros(4, dtype=torch.long))
