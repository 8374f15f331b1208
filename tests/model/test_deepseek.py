"""DeepSeekMoE-16B's architecture, which transformers lacks, against its paper written out token by token."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import moesvd_quant
from moesvd_quant.model.stream import StreamedModel

IDS = torch.randint(1, 250, (2, 13), generator=torch.Generator().manual_seed(5))
HIDDEN, HEADS, EXPERTS, TOP, INNER, SHARED, VOCABULARY = 64, 4, 8, 3, 24, 2, 320
CONFIG = {
    # As published: remote code is named, and must not be run.
    "architectures": ["DeepseekForCausalLM"],
    "auto_map": {"AutoConfig": "evil.DeepseekConfig", "AutoModelForCausalLM": "evil.DeepseekForCausalLM"},
    "model_type": "deepseek", "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 96,
    "moe_intermediate_size": INNER, "num_hidden_layers": 3, "num_attention_heads": HEADS, "num_key_value_heads": HEADS,
    "n_shared_experts": SHARED, "n_routed_experts": EXPERTS, "num_experts_per_tok": TOP, "moe_layer_freq": 1,
    "first_k_dense_replace": 1, "norm_topk_prob": False, "scoring_func": "softmax", "aux_loss_alpha": 0.001,
    "seq_aux": True, "hidden_act": "silu", "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 10000,
    "rope_scaling": None, "attention_bias": False, "tie_word_embeddings": False, "torch_dtype": "float32",
    "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


def shapes():
    """Tensors of the published files."""
    found = {"model.embed_tokens": (VOCABULARY, HIDDEN), "lm_head": (VOCABULARY, HIDDEN), "model.norm": (HIDDEN,)}
    for i in range(3):
        at = f"model.layers.{i}"
        found |= {f"{at}.{norm}_layernorm": (HIDDEN,) for norm in ("input", "post_attention")}
        found |= {f"{at}.self_attn.{p}_proj": (HIDDEN, HIDDEN) for p in "qkvo"}
        mlps = {"mlp": 96} if i == 0 else {f"mlp.experts.{e}": INNER for e in range(EXPERTS)}
        if i:
            found[f"{at}.mlp.gate"] = (EXPERTS, HIDDEN)
            mlps["mlp.shared_experts"] = SHARED * INNER
        for name, inner in mlps.items():
            found |= {f"{at}.{name}.{p}_proj": (inner, HIDDEN) for p in ("gate", "up")}
            found[f"{at}.{name}.down_proj"] = (HIDDEN, inner)
    return {f"{name}.weight": shape for name, shape in found.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made, generator = tmp_path_factory.mktemp("deepseek"), torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes().items():
        value = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        tensors[name] = value if len(shape) == 2 else 1 + value
    save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
    (made / "config.json").write_text(json.dumps(CONFIG))
    return made


def rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def rotate(x):
    """Rotary embedding of (length, head size): dimension i turns with i + size/2, by position / 10000**(2i/size)."""
    half = x.shape[-1] // 2
    angle = torch.arange(len(x))[:, None] / 10000 ** (torch.arange(half) / half)
    a, b = x[:, :half], x[:, half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def mlp(x, w, at):
    return w[f"{at}.down_proj"] @ (F.silu(w[f"{at}.gate_proj"] @ x) * (w[f"{at}.up_proj"] @ x))


def reference(ids, w):
    """Logits (length, vocabulary) of one sequence."""
    x = w["model.embed_tokens"][ids]
    for i in range(3):
        at, size = f"model.layers.{i}", HIDDEN // HEADS
        h = rms(x, w[f"{at}.input_layernorm"])
        q, k, v = (h @ w[f"{at}.self_attn.{p}_proj"].T for p in "qkv")
        heads = []
        for n in range(HEADS):
            part = slice(n * size, (n + 1) * size)
            scores = rotate(q[:, part]) @ rotate(k[:, part]).T / size**0.5
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf"))
            heads.append(scores.softmax(-1) @ v[:, part])
        x = x + torch.cat(heads, -1) @ w[f"{at}.self_attn.o_proj"].T
        h = rms(x, w[f"{at}.post_attention_layernorm"])
        out = []
        for token in h:
            if i == 0:
                out.append(mlp(token, w, f"{at}.mlp"))
                continue
            share = (w[f"{at}.mlp.gate"] @ token).softmax(-1)  # not renormalized over the chosen
            y = mlp(token, w, f"{at}.mlp.shared_experts")
            for expert in share.argsort(descending=True)[:TOP].tolist():
                y = y + share[expert] * mlp(token, w, f"{at}.mlp.experts.{expert}")
            out.append(y)
        x = x + torch.stack(out)
    return rms(x, w["model.norm"]) @ w["lm_head"].T


def test_logits_are_those_of_the_paper(folder):
    weights = {name.removesuffix(".weight"): t for name, t in load_file(folder / "model.safetensors").items()}
    expected = torch.stack([reference(ids, weights) for ids in IDS])
    with torch.no_grad():
        got = moesvd_quant.load(folder)(IDS).logits
    assert torch.allclose(got, expected, atol=1e-4), float((got - expected).abs().max())
    assert expected.std() > 0.1
    assert torch.allclose(torch.cat(list(StreamedModel(folder).logits(IDS))), expected, atol=1e-4)


def test_saved_it_has_the_published_names(folder, tmp_path):
    moesvd_quant.load(folder).save_pretrained(tmp_path)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
