"""Engines of others: what comes through the pipe is compared with the original, and broken ones are named."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import moesvd_quant
from moesvd_quant.evaluation.benchmarks.peer_engines import OURS, Peer, PeerError, make, predictions
from moesvd_quant.evaluation.benchmarks.peer_table import Measured, OnText, at_bytes, plot, table, verdicts
from moesvd_quant.evaluation.benchmarks.peers import measured, prepare

FAKE = """
import json, pathlib, sys
import torch
sys.path.insert(0, {scripts!r})
from exchange import main, texts
from transformers import AutoModelForCausalLM

def make(model, windows, setting, out):
    out.mkdir()
    (out / "model.safetensors").write_bytes(bytes(1000))
    (out / "sizes.json").write_text(json.dumps({{"layers.0.experts.0.w.qweight": 600, "embed_tokens.weight": 300}}))
    (out / "of.json").write_text(json.dumps([str(model), setting]))

def logits(windows, out):
    model, setting = json.loads((out / "of.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    rows = torch.from_numpy(texts(windows))
    if setting == "dies":
        raise SystemExit("out of luck")
    with torch.no_grad():
        for row in {{"hot": rows, "short": rows[:-1], "long": torch.cat([rows, rows])}}[setting]:
            yield (loaded(input_ids=row[None]).logits[0] / 2).numpy()

main(make, logits)
"""


@pytest.fixture(scope="module")
def task(make_model, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("peers")
    given = [f"calibration.dataset={text}", "calibration.samples=8", "calibration.length=32", "evaluate.perplexity=[]"]
    (out / "short.txt").write_text(text.read_text()[:2000])
    (out / "other.txt").write_text(text.read_text()[2000:5000])
    texts = {"short": str(out / "short.txt"), "other": str(out / "other.txt")}
    return prepare(make_model("mixtral"), out, texts, given, 32)


def fake(tmp_path: Path, setting: str) -> Peer:
    script = tmp_path / "fake.py"
    script.write_text(FAKE.format(scripts=str(Path(__file__).parents[1] / "evaluation/benchmarks/engines")))
    return Peer(f"fake-{setting}", "fake", OURS, str(script), setting)


def result(peer: Peer, task, tmp_path: Path) -> Measured:
    made = make(peer, task.model, task.file, tmp_path / "out")
    return measured(peer.name, peer.family, made, task, predictions(peer, made, task.file, (32, task.vocabulary)))


@pytest.mark.slow
def test_a_peer_of_twice_the_temperature_is_as_far_as_the_formula_says(task, tmp_path):
    found = result(fake(tmp_path, "hot"), task, tmp_path)
    assert (found.bytes, found.bits) == (1000, 8 * 600 / task.weights)
    model = moesvd_quant.load(task.model)
    for name, windows in task.windows.items():
        with torch.no_grad():
            logits = model(windows).logits[:, :-1].double()
        cold, hot = logits.softmax(-1), (logits / 2).softmax(-1)
        divergence = (cold * (cold.log() - hot.log())).sum(-1).mean()
        assert found.texts[name].divergence == pytest.approx(float(divergence), rel=1e-4)
        assert found.texts[name].top1 == 1.0  # no temperature changes which token is likeliest
        nll = -hot.log().gather(-1, windows[:, 1:, None]).mean()
        assert found.texts[name].perplexity == pytest.approx(math.exp(nll), rel=1e-4)


@pytest.mark.slow
def test_a_peer_that_breaks_is_named_with_its_reason(task, tmp_path):
    with pytest.raises(PeerError, match="out of luck"):
        result(fake(tmp_path, "dies"), task, tmp_path)
    with pytest.raises(PeerError, match="predictions of"):
        result(fake(tmp_path, "short"), task, tmp_path)
    with pytest.raises(PeerError, match="more windows"):
        result(fake(tmp_path, "long"), task, tmp_path)


def test_the_importance_matrix_is_the_mean_square_of_the_tokens_that_reach_an_expert(task):
    found = load_file(task.file.with_name("importance.safetensors"))
    model, windows = moesvd_quant.load(task.model), load_file(task.file)["calibration"]
    block = model.model.layers[0].mlp
    seen = []
    block.register_forward_hook(lambda module, given, out: seen.append(given[0].flatten(0, 1)))
    with torch.no_grad():
        model(windows)
        scores = seen[0] @ block.gate.weight.T
    inside = (scores.topk(block.gate.top_k).indices == 1).any(-1)
    wanted = seen[0][inside].square().mean(0)
    got = found["blk.0.ffn_up_exps.weight"].view(-1, wanted.numel())[1]
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def one(name: str, family: str, size: int, mean: float) -> Measured:
    return Measured(name, family, size, 2.0, {"wiki": OnText(30.0, mean, 0.5)})


def test_the_verdict_compares_at_equal_bytes(tmp_path):
    assert at_bytes([(100, 0.4), (400, 0.1)], 200) == pytest.approx(0.2)  # straight in the logarithms
    assert at_bytes([(100, 0.4), (400, 0.1)], 99) is None
    found = [one("fit@1", "fit", 100, 0.4), one("fit@4", "fit", 400, 0.1), one("good", "a", 200, 0.16)]
    found += [one("bad", "b", 200, 0.4), one("tiny", "b", 50, 0.5)]
    judged = verdicts(found).rows
    assert [(row[0], row[-2], row[-1]) for row in judged] == [
        ("good", 1.25, "good is better on wiki"),
        ("bad", 0.5, "fit is better"),
    ]
    assert [row[1] for row in table(found).rows] == ["fit@4", "good", "bad", "fit@1", "tiny"]
    plot(found, tmp_path / "peers.png")
    assert (tmp_path / "peers.png").stat().st_size > 5000
