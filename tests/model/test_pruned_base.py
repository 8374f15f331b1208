"""A pruned base against each token computed alone from the definition; nothing depends on the batch."""

import pytest
import torch
import torch.nn.functional as F

from moesvd_quant.checkpoint.layout import factor_part
from moesvd_quant.model.experts import expert_count, find_experts, shapes_of
from moesvd_quant.runtime import pruned_base
from moesvd_quant.runtime.factorized_experts import FactorizedExperts
from moesvd_quant.runtime.parts import DensePart
from tiny import fill_banks, tiny_model

STORED, USED = 40, 24


def pruned(architecture="mixtral", dynamic=True):
    """A base that keeps STORED channels, of which a token uses USED, and deltas of rank 16; all random."""
    native = next(module for _, module in find_experts(tiny_model(architecture)))
    count, layout = expert_count(native), {}
    everyone = list(range(count))
    for name in shapes_of(native):
        base = DensePart(everyone, [0] * count, **{"columns" if name == "down" else "rows": STORED})
        if dynamic and name != "gate":
            base.dynamic = USED
        layout[name] = [base, factor_part(everyone, 16)]
    made = FactorizedExperts(native, layout)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        fill_banks(made, generator)
        made.channels.copy_(torch.randperm(shapes_of(native)["down"][1], generator=generator)[:STORED].sort().values)
        for key in ("channel_prior", "channel_weight") if dynamic else ():
            values = torch.rand(STORED, generator=generator)
            made._parameters[key].copy_((values / values.sum()).view(torch.int32))
    return made


def calls(tokens=13, experts=4, k=2):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(tokens, 64, generator=generator)
    index = torch.stack([torch.randperm(experts, generator=generator)[:k] for _ in range(tokens)])
    return hidden, index, torch.rand(tokens, k, generator=generator)


def bits(module, key):
    return module._parameters[key].view(torch.float32)


def one_token(made, x, experts, weights):
    """The definition: this token's own choice of channels, then full-size weights of each of its experts."""
    bases = {name: made.bank(name, 0, "dense", torch.float32, 0) for name in ("gate", "up", "down")}
    kept = torch.zeros(made.shapes["down"][1])
    if "channel_prior" in made._parameters:
        energy = F.silu(bases["gate"] @ x) ** 2 * bits(made, "channel_weight")
        score = bits(made, "channel_prior") + energy / energy.sum()
        kept[made.channels.long()[score.sort(descending=True).indices[:USED]]] = 1
    else:
        kept[made.channels.long()] = 1
    out = torch.zeros(64)
    for e, scale in zip(experts.tolist(), weights):
        delta = {
            n: made.bank(n, 1, "left", torch.float32, e) @ made.bank(n, 1, "right", torch.float32, e) for n in bases
        }
        whole = {n: made.spread(made.layout[n][0], bases[n]) for n in bases}
        gate = (whole["gate"] + delta["gate"]) @ x
        up = (whole["up"] * kept[:, None] + delta["up"]) @ x
        out += scale * ((whole["down"] * kept + delta["down"]) @ (F.silu(gate) * up))
    return out


@pytest.mark.parametrize("dynamic", [True, False])
@torch.no_grad()
def test_every_token_gets_what_the_definition_says(dynamic):
    made = pruned(dynamic=dynamic)
    hidden, index, weights = calls()
    expected = torch.stack([one_token(made, *one) for one in zip(hidden, index, weights)])
    assert torch.allclose(made(hidden, index, weights), expected, atol=1e-4)
    assert expected.std() > 0.1


@torch.no_grad()
def test_tokens_choose_differently_and_whatever_they_are_batched_with():
    made = pruned()
    hidden, index, weights = calls()
    whole = made(hidden, index, weights)
    gate = F.linear(hidden, made.bank("gate", 0, "dense", torch.float32, 0))
    masks = made.channel_mask(gate)
    assert (masks.sum(1) == USED).all() and len(masks.unique(dim=0)) == len(masks)
    order = torch.randperm(13, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(made(hidden[order], index[order], weights[order]), whole[order], atol=1e-6)
    for t in range(13):
        alone = made(hidden[t : t + 1], index[t : t + 1], weights[t : t + 1])
        assert torch.allclose(alone[0], whole[t], atol=1e-5)


@torch.no_grad()
def test_without_dynamic_the_dense_weights_are_the_same_function():
    made = pruned(dynamic=False)
    hidden, index, weights = calls()
    out = torch.zeros_like(hidden)
    for t in range(13):
        for e, scale in zip(index[t].tolist(), weights[t]):
            gate, up = (made.dense(name, e) @ hidden[t] for name in ("gate", "up"))
            out[t] += scale * (made.dense("down", e) @ (F.silu(gate) * up))
    assert torch.allclose(made(hidden, index, weights), out, atol=1e-4)


@pytest.mark.parametrize("dynamic", [True, False])
@torch.no_grad()
def test_the_base_meets_each_token_once(dynamic, monkeypatch):
    made, rows = pruned(dynamic=dynamic), []
    linear = F.linear

    def count(x, weight, *rest):
        if STORED in weight.shape:
            rows.append(len(x))
        return linear(x, weight, *rest)

    monkeypatch.setattr(pruned_base.F, "linear", count)
    made(*calls())
    assert rows == [13, 13, 13]  # gate, up and down, for 13 tokens of two experts each


@pytest.mark.parametrize("architecture", ["gpt_oss", "mixtral"])
@torch.no_grad()
def test_casts_leave_the_choice_alone(architecture):
    made = pruned(architecture)
    before = {key: made._parameters[key].clone() for key in ("channels", "channel_prior", "channel_weight")}
    made.to(torch.bfloat16)
    for key, tensor in before.items():
        assert torch.equal(tensor, made._parameters[key])
    hidden, index, weights = calls()
    y = made(hidden.bfloat16(), index, weights.bfloat16())
    assert y.dtype == torch.bfloat16 and torch.isfinite(y).all()
