"""`make train-reference` in miniature: interrupted or not, the same weights; those of a loop written out here."""

import gzip
import json
import lzma
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, set_seed

from moesvd_quant.errors import MoesvdError
from moesvd_quant.reference import experts, path, texts, train, training
from moesvd_quant.reference.kinds import Kind, config_of

TOKENIZER = AutoTokenizer.from_pretrained(path())
BATCH, LENGTH = 4, 16
STEP = BATCH * LENGTH


@pytest.fixture
def corpus(tmp_path) -> Path:
    """Two sources of text, packed in two ways, and a held-out file."""
    draw, folder = random.Random(0), tmp_path / "corpus"
    folder.mkdir()
    for name, documents in (("wiki.train.jsonl.gz", 60), ("code.train.jsonl.xz", 20), ("wiki.valid.jsonl.gz", 10)):
        made = [" ".join(draw.choices(["one", "two", "three", "four"], k=40)) for _ in range(documents)]
        with (gzip if name.endswith("gz") else lzma).open(folder / name, "wt") as file:
            file.write("\n".join(json.dumps({"text": text}) for text in made))
    return folder


@pytest.fixture
def small(monkeypatch) -> None:
    """Both kinds, 32 wide."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 8}

    def config(kind, tokenizer, length):
        whole = config_of(kind, tokenizer, length)
        for name, size in sizes.items():
            setattr(whole, name, size)
        return whole

    monkeypatch.setattr(train, "config_of", config)


def sitting(corpus: Path, out: Path, steps: int, **options) -> Path:
    train.main(corpus, out, tokens=steps * STEP, device="cpu", batch=BATCH, length=LENGTH, **options)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("kind", Kind)
def test_many_sittings_make_the_weights_of_one(kind, corpus, tmp_path, small):
    once = sitting(corpus, tmp_path / "once", 10, kind=kind)
    often = tmp_path / "often"
    for _ in range(2):  # no time at all: one step, and one that cools down
        sitting(corpus, often, 10, kind=kind, minutes=0)
    assert {file.name for file in often.glob(f"{kind}-checkpoints/*/*")} == {"checkpoint-2", "checkpoint-3"}
    assert AutoModelForCausalLM.from_pretrained(often / kind).config.hidden_size == 32
    sitting(corpus, often, 5, kind=kind)  # then more tokens than were planned at first
    sitting(corpus, often, 10, kind=kind)
    for file in (f"{kind}-checkpoints/cooled-8-2/checkpoint-10/model.safetensors", f"{kind}/model.safetensors"):
        expected, found = load_file(once / file), load_file(often / file)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert (once / kind / "README.md").read_text() == (often / kind / "README.md").read_text()


@pytest.mark.parametrize("kind", Kind)
def test_the_result_is_a_plain_model_with_its_card(kind, corpus, tmp_path, small):
    folder = sitting(corpus, tmp_path / "out", 5, kind=kind) / kind
    assert not [file for file in folder.iterdir() if file.suffix not in {".json", ".safetensors", ".md"}]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16 and model.config.use_cache and not model.config.output_router_logits
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.model_max_length == model.config.max_position_embeddings == LENGTH
    assert tokenizer("four two").input_ids == TOKENIZER("four two").input_ids
    held_out = texts.windows(corpus / "wiki.valid.jsonl.gz", tokenizer, LENGTH, tmp_path)
    tokens = torch.from_numpy(np.stack(held_out["input_ids"]).astype(np.int64))
    with torch.no_grad():
        perplexity = model(tokens, labels=tokens).loss.exp()
    card = (folder / "README.md").read_text()
    printed = card.partition("| wiki | ")[2].partition(" |")[0]
    assert float(printed) == pytest.approx(float(perplexity), rel=0.02)
    assert "code.train.jsonl.xz: unstated" in card and f"{5 * STEP / 1e6:.1f} M tokens: 5 steps" in card


def test_a_loop_written_out_gives_the_same_weights(tmp_path, monkeypatch):
    """AdamW by PyTorch at the rates of the formula, on windows that are all alike, so that their order is nothing."""
    monkeypatch.setattr(training, "WARMUP_STEPS", 2)
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=64, num_key_value_heads=1, tie_word_embeddings=True, **sizes)
    window = np.arange(16, dtype=np.uint16) * 3
    windows = Dataset.from_dict({"input_ids": [window] * 8}).with_format("numpy")
    run = training.Training(config, windows, tmp_path, 2, steps=10, device=torch.device("cpu"))
    found = load_file(run.run() / "model.safetensors")

    set_seed(training.SEED)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    vectors = [p for p in model.parameters() if p.ndim == 1]
    matrices = [p for p in model.parameters() if p.ndim > 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    tokens = torch.from_numpy(window.astype(np.int64)).expand(2, -1)
    for factor in (0, 0.5, 1, 1, 1, 1, 1, 1, 1, 1 - 0.5**0.5):  # eight of constant rate, two that cool down
        for group in optimizer.param_groups:
            group["lr"] = training.PEAK * factor
        model(tokens, labels=tokens, output_router_logits=True).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    trained = load_saved(model, tmp_path / "loop")
    assert trained.keys() == found.keys()
    for name, tensor in trained.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def load_saved(model, folder: Path) -> dict[str, torch.Tensor]:
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("kind", Kind)
def test_experts_in_autocast_are_transformers_own(kind):
    """Output and gradients of its loop over experts, but for what bfloat16 rounds; float32 outside autocast."""
    set_seed(0)
    config = config_of(kind, TOKENIZER, LENGTH)
    bank = AutoModelForCausalLM.from_config(config, dtype=torch.float32).model.layers[0].mlp.experts
    hidden = torch.randn(40, 256)
    weights, index = torch.rand(40, bank.num_experts).topk(config.num_experts_per_tok)

    def run(implementation, autocast):
        bank.config._experts_implementation = implementation
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = bank(hidden, index, weights)
        out.float().square().sum().backward()
        grads = [p.grad.clone() for p in bank.parameters()]
        bank.zero_grad()
        return [out.detach(), *grads]

    def error(implementation, autocast):
        pairs = zip(run(implementation, autocast), exact)
        return max(float((found - one).norm() / one.norm()) for found, one in pairs)

    exact = run("eager", False)
    assert error(experts.NAME, False) < 1e-5
    assert 1e-4 < error(experts.NAME, True) < 2 * error("eager", True)


def test_windows_hold_the_text_and_are_made_once(corpus, tmp_path):
    file = corpus / "code.train.jsonl.xz"
    made = texts.windows(file, TOKENIZER, LENGTH, tmp_path / "cache")
    with lzma.open(file, "rt") as lines:
        whole = "".join(json.loads(line)["text"] + TOKENIZER.eos_token for line in lines)
    read = TOKENIZER.decode(np.concatenate(made["input_ids"]))
    assert whole.startswith(read) and len(whole) - len(read) < 10 * LENGTH
    written = {entry["filename"]: Path(entry["filename"]).stat().st_mtime_ns for entry in made.cache_files}
    again = texts.windows(file, AutoTokenizer.from_pretrained(path()), LENGTH, tmp_path / "cache")
    assert written == {e["filename"]: Path(e["filename"]).stat().st_mtime_ns for e in again.cache_files}
    assert list((tmp_path / "cache").rglob("*.arrow"))


def test_sources_are_mixed_by_tempered_size():
    large, little = (
        Dataset.from_dict({"input_ids": np.arange(start, start + count)}) for start, count in ((0, 5000), (9000, 50))
    )
    found = np.array(texts.mixed([large, little], 0)["input_ids"])
    assert set(found) == {*range(5000), *range(9000, 9050)}
    share = 50**0.7 / (50**0.7 + 5000**0.7)
    assert (found >= 9000).mean() == pytest.approx(share, rel=0.2) and share > 3 * 50 / 5050


@pytest.mark.parametrize("kind", Kind)
def test_sizes_are_those_that_are_told(kind):
    """Parameters by hand; bytes that a wheel may hold; rows that llama.cpp's types take."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(kind, TOKENIZER, 512))
    attention, norms = 2 * 256 * 256 + 2 * 128 * 256, 2 * 256
    mixtral = attention + norms + 8 * (3 * 256 * 256 + 256)
    fine = attention + (256 + 128 + 128) + norms + 64 * (3 * 64 * 256 + 256) + 3 * 256 * 256 + 256
    parameters = 4096 * 256 + 256 + {Kind.mixtral: 5 * mixtral, Kind.fine: 4 * fine}[kind]
    assert sum(p.numel() for p in model.parameters()) == parameters
    if kind == Kind.mixtral:
        assert 2 * parameters < 20e6
        assert {p.shape[-1] % 256 for p in model.parameters()} == {0}


def test_a_training_goes_on_with_the_batches_that_it_was_begun_with(corpus, tmp_path, small):
    sitting(corpus, tmp_path / "out", 2)
    with pytest.raises(MoesvdError, match=r"was begun with .*'batch': 4"):
        train.main(corpus, tmp_path / "out", tokens=2 * STEP, device="cpu", batch=2, length=LENGTH)
    with pytest.raises(MoesvdError, match="no training files"):
        train.main(tmp_path, tmp_path / "out")
