"""Engines of others beside this one, on one model and the same calibration windows: `make bench-peers`."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import load_file, save_file

from moesvd_quant.calibration.store import fingerprint
from moesvd_quant.calibration.text import load_documents, token_windows
from moesvd_quant.comparison.bench import written
from moesvd_quant.errors import UsageError
from moesvd_quant.evaluation.benchmarks.budget import beginning
from moesvd_quant.evaluation.benchmarks.peer_engines import (
    OURS,
    Made,
    Peer,
    PeerError,
    install,
    make,
    predictions,
    write_importance,
)
from moesvd_quant.evaluation.benchmarks.peer_table import Measured, OnText, plot, table, verdicts
from moesvd_quant.evaluation.difference import difference
from moesvd_quant.evaluation.memory import disk_bytes
from moesvd_quant.evaluation.original import original_predictions
from moesvd_quant.evaluation.perplexity import perplexity
from moesvd_quant.evaluation.table import render, save
from moesvd_quant.memory.files import read_json, write_json
from moesvd_quant.model.named import resolve_model
from moesvd_quant.model.stream import StreamedModel
from moesvd_quant.model.tokenizer import load_tokenizer
from moesvd_quant.planning.shares import parameters_of
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.recipe.texts import named_texts
from moesvd_quant.run.run import Run
from moesvd_quant.run.threads import sync_threads
from moesvd_quant.runtime.modeling_moesvd import file_digest

BUDGETS = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0)  # bits per original expert weight
GGUF = ("q4_0", "q4_k_m", "q3_k_m", "iq3_xxs", "q2_k", "iq2_xs", "iq1_m", "iq1_s")
GGUF16 = ("q4_0", "q4_k_m")  # of them with the embedding in 16 bit: enough to see what its bytes are worth
REAP = ("0.25+4", "0.25+3")
# What was looked for and cannot run on a machine without a GPU and with a package index alone.
ABSENT = {
    "EXL3 (exllamav3, GPTQModel)": "its quantizer is written in CUDA alone",
    "AQLM, VPTQ, QuIP#": "their quantizers need CUDA, and hours of it",
    "ik_llama.cpp": "in no package index",
}


def peers() -> list[Peer]:
    """All that are installed and run."""
    widths = ("4", "3", "2")
    return [
        *(Peer(f"gptqmodel{bits}", "GPTQModel", OURS, "with_gptqmodel.py", bits) for bits in widths),
        *(Peer(f"auto-round{bits}", "AutoRound", "auto-round", "with_auto_round.py", bits) for bits in widths),
        Peer("nf4", "bitsandbytes", OURS, "with_bitsandbytes.py", "nf4"),
        *(Peer(f"reap{s}", "llm-compressor REAP", "llm-compressor", "with_llm_compressor.py", s) for s in REAP),
        *(Peer(f"{kind}", "llama.cpp", "llama-cpp", "with_llamacpp.py", kind) for kind in GGUF),
        *(
            Peer(f"{k}+16", "llama.cpp, embedding in 16 bit", "llama-cpp", "with_llamacpp.py", f"{k}+16")
            for k in GGUF16
        ),
    ]


def ours() -> dict[str, tuple[str, list[str]]]:
    """{name: (recipe, overrides)} of what is compared with them."""
    made: dict[str, tuple[str, list[str]]] = {f"gptq{bits}": (f"gptq{bits}", []) for bits in (4, 3, 2)}
    made |= {f"trellis{bits}": ("trellis3", [f"gptq.bits={bits}"]) for bits in (4, 3, 2)}
    return made | {f"fit@{bits}": ("fit", [f"budget={bits}bpw"]) for bits in BUDGETS}


@dataclass(frozen=True)
class Task:
    """What all engines are given. windows: {text: (n, length) int64} in the order of their names, which is also that of
    `file`; perplexities: of the model; weights: of its routed experts; vocabulary: tokens that it knows."""

    model: Path
    file: Path
    windows: dict[str, torch.Tensor]
    perplexities: dict[str, float]
    weights: int
    vocabulary: int


def in_float32(folder: Path, windows: torch.Tensor) -> Iterator[torch.Tensor]:
    """Logits (batch, length, vocabulary)."""
    return StreamedModel(folder, torch.float32).logits(windows)


def original_of(model: Path, windows: torch.Tensor) -> Iterator[torch.Tensor]:
    """Logits (batch, length, vocabulary), in float32, of one walk for all engines."""
    return original_predictions(model, windows, "cpu", lambda what, done, total: None)


def prepare(model: Path, out: Path, texts: dict[str, str], given: list[str], length: int) -> Task:
    """Writes the windows of the calibration and of all texts into a file that every engine reads, and llama.cpp's
    importance matrix beside it."""
    job, tokenizer = Run(load_recipe("gptq4", given), model, out / "calibration"), load_tokenizer(model)
    windows = {name: token_windows(load_documents(texts[name]), tokenizer, length) for name in sorted(texts)}
    file = out / "windows.safetensors"
    given_to_all = {"calibration": job.windows.contiguous(), **windows}
    if not same(file, given_to_all):
        save_file(given_to_all, file)
        write_importance(model, file)
    found = {name: perplexity(lambda own, batch: original_of(model, own), own).ppl for name, own in windows.items()}
    return Task(model, file, windows, found, parameters_of(job.meta), job.meta.config.vocab_size)


def same(file: Path, wanted: dict[str, torch.Tensor]) -> bool:
    """Whether a file holds these tensors and no others."""
    found = load_file(file) if file.is_file() else {}
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def measured(name: str, family: str, made: Made, task: Task, logits: Iterator[torch.Tensor]) -> Measured:
    """Compares what an engine predicts, window by window and text by text, with the original. PeerError where it has
    other windows than were given."""
    found = {}
    for text, windows in task.windows.items():
        alike = torch.zeros_like(windows[:, 1:])  # kinds of tokens are not told apart
        try:
            one = difference(original_of(task.model, windows), islice(logits, len(windows)), windows, alike)
        except UsageError as why:
            raise PeerError(f"{name}: {text}: {why}") from why
        found[text] = OnText(task.perplexities[text] * (1 + one.change["change"]), one.mean, one.top1)
    if next(logits, None) is not None:
        raise PeerError(f"{name}: has logits of more windows than there are")
    return Measured(name, family, made.bytes, 8 * made.experts / task.weights, found)


def own_result(name: str, recipe: Path, task: Task, out: Path) -> Measured:
    """Of this package."""
    folder = Run(load_recipe(str(recipe), ["keep=last"]), task.model, out / "ours" / name).run()[-1]
    sizes = disk_bytes(folder)
    made = Made(folder, sizes["total"], sizes["experts"])
    rows = (row[None] for windows in task.windows.values() for batch in in_float32(folder, windows) for row in batch)
    return measured(name, name.partition("@")[0].rstrip("234"), made, task, rows)


def peer_result(peer: Peer, task: Task, out: Path) -> Measured:
    """PeerError with the reason where it cannot be had here."""
    install(peer.environment)
    made = make(peer, task.model, task.file, out / "peers")
    shape = next(iter(task.windows.values())).shape[1], task.vocabulary
    return measured(peer.name, peer.family, made, task, predictions(peer, made, task.file, shape))


def kept(name: str, key: str, out: Path, obtain: Callable[[], Measured]) -> Measured:
    """What was measured before with the same key, else anew."""
    file = out / "measured" / f"{name}.json"
    if file.is_file() and (found := read_json(file))["key"] == key:
        return Measured.from_dict(found["measured"])
    result = obtain()
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"key": key, "measured": asdict(result)})
    return result


def main(
    model: Annotated[str, typer.Option(help="A Mixtral model.")] = "reference",
    text: Annotated[list[str] | None, typer.Option(help="Text to measure on, name=source; repeat it.")] = None,
    first: Annotated[int, typer.Option(help="Bytes of each text that are read.")] = 30_000,
    calibration: Annotated[str, typer.Option(help="Calibration texts, joined by commas.")] = "mixture",
    samples: Annotated[int, typer.Option(help="Windows of calibration text.")] = 128,
    length: Annotated[int, typer.Option(help="Tokens per window.")] = 256,
    only: Annotated[list[str] | None, typer.Option(help="Engines (fit, AutoRound); repeat it. Default: all.")] = None,
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("peers-out"),
) -> None:
    """Compresses a model by every engine, and compares what each predicts with the original. Goes on where it was."""
    sync_threads()
    folder = resolve_model(model)
    sources = named_texts(text or ["wikitext2", "code"])
    texts = {name: beginning(source, first, out / "texts" / f"{name}.txt") for name, source in sources.items()}
    given = [f"calibration.dataset={calibration}", f"calibration.samples={samples}"]
    given += [f"calibration.length={length}", "evaluate.perplexity=[]"]
    task = prepare(folder, out, texts, given, length)
    own = {
        Peer(name, name.partition("@")[0].rstrip("234"), OURS, "", ""): partial(own_result, name, file, task, out)
        for name, file in written(ours(), out / "recipes", given).items()
    }
    every = own | {peer: partial(peer_result, peer, task, out) for peer in peers()}
    key, found, missing = fingerprint(folder) + file_digest(task.file), [], dict(ABSENT)
    for peer, obtain in every.items():
        if only and peer.family not in only:
            continue
        print(peer.name, flush=True)
        try:
            found.append(kept(peer.name, key, out, obtain))
        except PeerError as why:
            missing[peer.name] = str(why)
    report(found, missing, task, out)


def report(found: list[Measured], missing: dict[str, str], task: Task, out: Path) -> None:
    """Writes OUT/peers.md with all tables, peers.csv and .json, verdicts.*, peers.png; prints the first."""
    figures, judged = table(found), verdicts(found)
    save(figures, out / "peers")
    save(judged, out / "verdicts")
    plot(found, out / "peers.png")
    original = ", ".join(f"{name} {value:.2f}" for name, value in task.perplexities.items())
    absent = "".join(f"- {name}: {reason}\n" for name, reason in missing.items())
    said = f"Perplexity of the original: {original}\n\n{render(figures, 'markdown')}\n{judged.title}\n\n"
    said += f"{render(judged, 'markdown')}\nNot run here:\n\n{absent}"
    (out / "peers.md").write_text(said)
    print(said)


if __name__ == "__main__":
    typer.run(main)
