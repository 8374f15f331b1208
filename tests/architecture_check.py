"""What of moesvd_quant works on an architecture, in miniature: a row of the table in docs/architectures.md."""

import json
import random
from pathlib import Path

import torch

import moesvd_quant
from architectures import tiny_architecture
from moesvd_quant.model.experts import find_experts, find_linears, is_shared
from moesvd_quant.model.stream import StreamedModel
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.run.run import Run
from tiny import tiny_tokenizer

STEPS = ("read", "svd", "gptq4", "reload", "generate", "shared")
IDS = torch.randint(10, 250, (3, 32), generator=torch.Generator().manual_seed(0))


def write_text(path: Path) -> Path:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 7))) for _ in range(200)]
    path.write_text(" ".join(draw.choices(words, k=3000)))
    return path


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, in standard deviations of b."""
    return float((a - b).abs().max() / b.std())


def check(name: str, folder: Path) -> dict:
    """{"model_type", "class", "stateful", step: what it says, "pass", or why not}; a step is tried where those before
    passed."""
    row: dict = {"model_type": name, "class": "", "stateful": False} | dict.fromkeys(STEPS, "")
    made: dict = {"folder": folder / "model", "out": folder / "out", "text": write_text(folder / "text.txt")}
    for step in STEPS:
        try:
            said = globals()[f"_{step}"](name, made, row)
        except Exception as error:
            row[step] = f"{type(error).__name__}: {error}".splitlines()[0][:200].replace(str(folder), "")
            break
        row[step] = said or "pass"
    return row


def _read(name, made, row):
    """The layer walk gives what the model in memory gives."""
    model = tiny_architecture(name)
    row["class"] = type(model).__name__
    model.save_pretrained(made["folder"])
    tiny_tokenizer().save_pretrained(made["folder"])
    made["original"] = logits(model)
    assert torch.isfinite(made["original"]).all(), "the tiny model itself is not finite"
    streamed = StreamedModel(made["folder"])
    got = torch.cat(list(streamed.logits(IDS, 2)))
    row["stateful"] = streamed.stateful
    assert apart(got, made["original"]) < 1e-3, f"the walk is {apart(got, made['original']):.1e} off"


def _run(made, recipe, *overrides):
    small = [f"calibration.dataset={made['text']}", "calibration.samples=16", "calibration.length=48"]
    made["checkpoint"] = Run(
        load_recipe(recipe, [*small, "evaluate.perplexity=[]", *overrides]), made["folder"], made["out"]
    ).run()[-1]
    manifest = json.loads((made["checkpoint"] / "moesvd.json").read_text())
    assert manifest["check"]["kl"] < 0.5, f"it diverges by {manifest['check']['kl']:.2f} nats"
    return manifest


def _svd(name, made, row):
    """A fifth of the routed experts' parameters goes."""
    manifest = _run(made, "svd", "svd.ratio=0.2")
    row["removed"] = round(manifest["accounting"]["expert_ratio"], 4)
    assert row["removed"] > 0.05


def _gptq4(name, made, row):
    made["out"] = made["out"].with_name("out4")
    manifest = _run(made, "svd-gptq4", "svd.ratio=0.2")
    row["kl"] = round(manifest["check"]["kl"], 5)
    row["bits"] = round(manifest["accounting"]["bits_per_expert_weight"], 3)
    row["left"] = sorted({why for why in manifest["notes"].get("kept in 16 bit", {}).values()})


def _reload(name, made, row):
    """The whole model in memory gives what the walk over the checkpoint gives."""
    made["model"] = moesvd_quant.load(made["checkpoint"])
    streamed = torch.cat(list(StreamedModel(made["checkpoint"]).logits(IDS, 2)))
    assert apart(streamed, logits(made["model"])) < 1e-3
    assert apart(streamed, made["original"]) > 1e-4, "nothing was changed"


def _generate(name, made, row):
    ids = IDS[:, :8]
    out = made["model"].generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert out.shape[1] > ids.shape[1]


def _shared(name, made, row):
    """Shared experts as experts: factorized, quantized, reloaded."""
    streamed = StreamedModel(made["folder"], shared=True)
    if not any(is_shared(experts) for _, experts in find_experts(streamed.model)):
        linears = any("shared" in path for path, _ in find_linears(streamed.model))
        return "linears" if linears else "none"
    made["out"] = made["out"].with_name("shared")
    _run(made, "svd-gptq4", "svd.ratio=0.2", "experts=all")
    _reload(name, made, row)
    assert any(is_shared(experts) for _, experts in find_experts(made["model"])), "none became factors"
