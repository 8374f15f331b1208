"""Statistics of a layer against hooks-free recomputation from the native modules' own formulas."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from moesvd_quant.calibration.metric import DIAGONAL, FREQUENCY, OWN, POOLED, Grams, blend, coverage, shrink
from moesvd_quant.calibration.recording import linear_gram
from moesvd_quant.calibration.statistics import LayerRecorder, outlier_share
from moesvd_quant.model.experts import find_experts, split_projections
from moesvd_quant.model.stream import StreamedModel
from tiny import ARCHITECTURES

WINDOWS = torch.randint(1, 250, (6, 32), generator=torch.Generator().manual_seed(4))


def walk(folder):
    """({layer: statistics}, hidden states after the walk)."""
    streamed, found = StreamedModel(folder), []
    for visit in streamed.walk(WINDOWS, 4):
        recorder = LayerRecorder(visit.layer)
        visit.outputs()
        recorder.detach()
        found.append(recorder.sums | {f"{k}/alias": v for k, v in recorder.aliases.items()})
        for path, experts in recorder.experts.items():
            ((_, sums),) = experts.groups()
            found[-1] |= {f"{path}/{name}": value for name, value in sums.items()}
    return found, torch.cat(list(streamed.hidden))


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
    shrunk = torch.stack(list(Grams(gram, tokens, shrink)))
    pooled = gram.sum(0) / tokens.sum()
    assert torch.allclose(shrunk[2], 6 * pooled)  # as if it had seen six tokens of the layer
    assert torch.allclose(shrunk[0], gram[0], rtol=1e-2, atol=20)
    assert torch.linalg.eigvalsh(shrunk).min() > 0
    assert coverage(tokens, 6) == {"none": [2, 3], "few": []}
    with pytest.raises(ValueError, match="no calibration token"):
        Grams(gram, torch.zeros(4, dtype=torch.long), shrink)


def test_blend_is_the_expected_error_over_three_kinds_of_inputs():
    """tr(D M D^T) is the mean squared output error, each kind of input drawn with its share."""
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(count, 5, generator=generator, dtype=torch.float64) * scale
        for count, scale in ((9000, 1), (3000, 3))
    ]
    gram, tokens = torch.stack([x.T @ x for x in inputs]), torch.tensor([9000, 3000])
    delta = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    everything = torch.cat(inputs)
    shuffled = torch.stack([column[torch.randperm(12000, generator=generator)] for column in everything.T], 1)
    weights = (tokens + 5.0) / (tokens + 5.0).mean()
    for expert, metric in enumerate(Grams(gram, tokens, blend)):
        errors = [float(((x @ delta.T) ** 2).sum(1).mean()) for x in (inputs[expert], everything, shuffled)]
        expected = float(weights[expert]) ** FREQUENCY * (OWN * errors[0] + POOLED * errors[1] + DIAGONAL * errors[2])
        assert float(((delta @ metric) * delta).sum()) == pytest.approx(expected, rel=0.02)
    assert pytest.approx(1) == OWN + POOLED + DIAGONAL


def test_an_expert_without_tokens_is_judged_like_its_layer():
    gram = torch.stack([torch.eye(3) * 600, torch.zeros(3, 3)])
    metric = Grams(gram, torch.tensor([600, 0]), blend)
    assert torch.allclose(metric[1] / metric[1].trace(), torch.eye(3) / 3)
    assert 0 < metric[1].trace() < metric[0].trace()
