"""One module stands in for every architecture's experts: against the native module, which is the truth."""

import pytest
import torch
from torch import nn

from moesvd_quant.checkpoint.layout import dense_part, factor_part
from moesvd_quant.checkpoint.verify import outputs
from moesvd_quant.model.experts import expert_count, find_experts, find_linears, shapes_of, split_projections
from moesvd_quant.runtime import expert_products
from moesvd_quant.runtime.factorized_experts import FactorizedExperts
from moesvd_quant.runtime.parts import DensePart
from tiny import ARCHITECTURES, fill_banks, tiny_model

pytestmark = pytest.mark.usefixtures("two_threads")

IDS = torch.randint(1, 300, (3, 24), generator=torch.Generator().manual_seed(5))


def full_rank(weight):
    """left (E, out, r) and right (E, r, in) whose product is the weight, r = min(out, in)."""
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    return (u * s[..., None, :]).float(), v.float()


def factorize(native, split_at=None):
    """FactorizedExperts at full rank; experts below `split_at` stay dense."""
    count, layout, banks = expert_count(native), {}, {}
    everyone = list(range(count))
    for name, weight in split_projections(native).items():
        low, high = everyone[:split_at] if split_at else [], everyone[split_at or 0 :]
        parts = [dense_part(low)] if low else []
        layout[name] = [*parts, factor_part(high, min(weight.shape[1:]))]
        if low:
            banks[f"{name}_0_dense"] = weight[low]
        left, right = full_rank(weight[high])
        at = len(parts)
        banks |= {f"{name}_{at}_left": left, f"{name}_{at}_right": right}
    made = FactorizedExperts(native, layout)
    with torch.no_grad():
        for key, value in banks.items():
            getattr(made, key).copy_(value)
    return made


def swap(model, **options):
    for path, native in list(find_experts(model)):
        model.set_submodule(path, factorize(native, **options))
    return model


@pytest.fixture(params=["one by one", "grouped"])
def products(request, monkeypatch):
    """Experts one after the other, as a CPU runs them, and in grouped products, as a GPU does."""
    monkeypatch.setattr(expert_products, "ONE_BY_ONE", ("cpu",) if request.param == "one by one" else ())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("split_at", [None, 2])
def test_full_rank_gives_the_same_logits(architecture, split_at, products):
    native = tiny_model(architecture)
    with torch.no_grad():
        expected = native(IDS).logits
        got = swap(tiny_model(architecture), split_at=split_at)(IDS).logits
    assert torch.allclose(got, expected, atol=1e-4), float((got - expected).abs().max())
    assert expected.std() > 0.1  # else nothing was compared


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
def test_gradients_are_those_of_the_dense_product(architecture, products):
    native = tiny_model(architecture)
    model = swap(tiny_model(architecture))
    native(IDS, labels=IDS).loss.backward()
    model(IDS, labels=IDS).loss.backward()
    for path, experts in find_experts(model):
        dense = native.get_submodule(path)
        dense.down_proj.data = dense.down_proj.grad
        first = "gate_up_proj" if hasattr(dense, "gate_up_proj") else "up_proj"
        getattr(dense, first).data = getattr(dense, first).grad
        for name, gradient in split_projections(dense).items():
            left, right = (experts.get_parameter(f"{name}_0_{bank}") for bank in ("left", "right"))
            assert torch.allclose(left.grad, gradient @ right.mT, atol=2e-5)  # d(left) = dW right^T
            assert torch.allclose(right.grad, left.mT @ gradient, atol=2e-5)


def loop_forward(experts, hidden, index, weights):
    """The definition: each token through the effective dense weights of its experts."""
    out = torch.zeros_like(hidden)
    for token, (row, scale) in enumerate(zip(index.tolist(), weights)):
        for expert, w in zip(row, scale):
            gate, up = (experts.dense(name, expert) @ hidden[token] for name in ("gate", "up"))
            out[token] += w * (experts.dense("down", expert) @ (torch.nn.functional.silu(gate) * up))
    return out


@pytest.mark.parametrize("parts", ["base and deltas", "shared right", "shared left", "a rank of zero"])
def test_shared_banks_follow_the_algebra(parts, products):
    native = next(module for _, module in find_experts(tiny_model("mixtral")))
    count, everyone = expert_count(native), list(range(expert_count(native)))
    layout = {}
    for name in shapes_of(native):
        layout[name] = {
            "base and deltas": [
                DensePart(everyone, [0] * count),
                factor_part(everyone, 16),
            ],
            "shared right": [factor_part(everyone, 16, right=[0] * count)],
            "shared left": [factor_part(everyone, 16, left=[0, 1, 0, 1])],
            "a rank of zero": [factor_part([0, 2], 32), factor_part([1], 16)],  # expert 3 has no part at all
        }[parts]
    made = FactorizedExperts(native, layout)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        fill_banks(made, generator)
        hidden = torch.randn(11, 64, generator=generator)
        index = torch.stack([torch.randperm(count, generator=generator)[:2] for _ in range(11)])
        weights = torch.rand(11, 2, generator=generator)
        assert torch.allclose(made(hidden, index, weights), loop_forward(made, hidden, index, weights), atol=1e-4)


def test_routers_and_shared_expert_gates_are_no_linears():
    names = [path for path, _ in find_linears(tiny_model("qwen2_moe").model.layers[0])]
    assert "mlp.shared_expert.gate_proj" in names and "self_attn.q_proj" in names
    assert not any(path.endswith((".gate", "shared_expert_gate")) or "experts." in path for path in names)


def special_experts(kind):
    """Experts without a gate (relu squared), and transposed ones, on their own."""
    from types import SimpleNamespace

    from transformers.models.aria.modeling_aria import AriaExperts
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    if kind == "no gate":
        config = SimpleNamespace(
            n_routed_experts=4, hidden_size=64, moe_intermediate_size=48, moe_latent_size=None, mlp_hidden_act="relu2",
            _experts_implementation="eager",
        )  # fmt: skip
        return NemotronHExperts(config)
    config = SimpleNamespace(
        moe_num_experts=4, hidden_size=64, intermediate_size=48, hidden_act="silu", _experts_implementation="eager"
    )
    return AriaExperts(config)


@pytest.mark.parametrize("kind", ["no gate", "transposed"])
def test_experts_without_a_gate_and_transposed_ones(kind):
    native = special_experts(kind)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in native.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        hidden = torch.randn(9, 64, generator=generator)
        index = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(9)])
        weights = torch.rand(9, 2, generator=generator)
        expected = native(hidden, index, weights)
        assert torch.allclose(factorize(native)(hidden, index, weights), expected, atol=1e-4)


def test_experts_that_lost_every_matrix_give_nothing():
    _, native = next(find_experts(tiny_model("mixtral")))
    made = FactorizedExperts(native, {"gate_up": [], "down": []})
    again = FactorizedExperts(made, made.layout)
    assert not list(again.parameters()) and again.dense("gate", 1).count_nonzero() == 0
    x, index = torch.ones(3, 64), torch.tensor([[0, 1], [1, 2], [3, 0]])
    assert torch.equal(again(x, index, torch.full((3, 2), 0.5)), torch.zeros(3, 64))
    assert outputs(nn.ModuleDict({"experts": again}), ["experts"])
