"""Trains the embedded reference Mixture of Experts, from scratch or on from an earlier one.

python -m moesvd_quant.reference.train --data FOLDER --out FOLDER [--start MODEL] [--tokens N]

FOLDER holds *.jsonl, *.jsonl.gz (field `text`), *.txt or *.txt.gz, one file per source; files with `.valid.` in
their name are only evaluated on. An optional sources.json in it, {name: "origin, licence"}, goes to the card.
"""

import json
import math
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from datasets import load_dataset
from rich.progress import Progress, TimeRemainingColumn
from transformers import (
    AutoTokenizer,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

LENGTH = 256
BATCH = 16
# Sources are drawn by size to this power: large ones lead, small ones are not drowned.
TEMPERATURE = 0.7
VALID_WINDOWS = 200


def text_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """(training, validation) files; BadParameter where there is none to train on."""
    endings = (".jsonl", ".jsonl.gz", ".txt", ".txt.gz")
    files = sorted(p for p in folder.glob("*") if p.name.endswith(endings)) if folder.is_dir() else []
    train = [p for p in files if ".valid." not in p.name]
    if not train:
        raise typer.BadParameter(f"{folder}: no training files ({', '.join(endings)})")
    return train, [p for p in files if ".valid." in p.name]


def texts(path: Path):
    """Documents of a file, streamed."""
    kind = "json" if ".jsonl" in path.name else "text"
    extra = {"sample_by": "paragraph"} if kind == "text" else {}
    for row in load_dataset(kind, data_files=str(path), split="train", streaming=True, **extra):
        yield row["text"]


def make_tokenizer(files: list[Path]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 4096 tokens learnt from the first documents of each file."""
    from tokenizers import ByteLevelBPETokenizer

    def sample():
        for path in files:
            for index, text in enumerate(texts(path)):
                if index == 2000:
                    break
                yield text

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(sample(), vocab_size=4096, special_tokens=["<|endoftext|>"])
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=end, eos_token=end, pad_token=end)


def new_model(tokenizer) -> MixtralForCausalLM:
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=len(tokenizer), hidden_size=192, intermediate_size=256, num_hidden_layers=4,
            num_attention_heads=3, num_key_value_heads=1, num_local_experts=8, num_experts_per_tok=2,
            max_position_embeddings=1024, tie_word_embeddings=True, router_aux_loss_coef=0.01,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip


def windows(path: Path, tokenizer, wanted: int) -> torch.Tensor:
    """Up to `wanted` windows (n, LENGTH) of a file, documents joined by the end-of-text token."""
    stream: list[int] = []
    for text in texts(path):
        stream += [*tokenizer(text, add_special_tokens=False, verbose=False).input_ids, tokenizer.eos_token_id]
        if len(stream) >= wanted * LENGTH:
            break
    count = min(wanted, len(stream) // LENGTH)
    return torch.tensor(stream[: count * LENGTH], dtype=torch.long).view(count, LENGTH)


@torch.no_grad()
def perplexities(model, valid: dict[str, torch.Tensor]) -> dict[str, float]:
    """Perplexity of each source over non-overlapping windows of LENGTH."""
    model.eval()
    result = {}
    for name, data in valid.items():
        losses = [
            model(batch, labels=batch, output_router_logits=False).loss * len(batch) for batch in data.split(BATCH)
        ]
        result[name] = math.exp(float(sum(losses)) / len(data))
    model.train()
    return result


def training_batches(files: list[Path], tokenizer, total: int, generator) -> torch.Tensor:
    """(total, LENGTH) windows of all files, mixed by tempered size and shuffled."""
    weights = [path.stat().st_size ** TEMPERATURE for path in files]
    shares = [math.ceil(total * w / sum(weights)) for w in weights]
    data = torch.cat([windows(path, tokenizer, share) for path, share in zip(files, shares)])
    return data[torch.randperm(len(data), generator=generator)[:total]]


def card(out: Path, figures: dict) -> None:
    """README.md: what the model is made of, and how well it does."""
    rows = [f"| {name} | {value:.1f} |" for name, value in figures["after"].items()]
    sources = [f"- {name}: {origin}" for name, origin in figures["sources"].items()]
    out.joinpath("README.md").write_text(
        "\n".join([
            "---", "license: apache-2.0", "---", "# Reference Mixture of Experts", "",
            "Mixtral architecture, 8 experts top-2, 4 layers, hidden 192, intermediate 256, vocabulary 4096 (own",
            f"byte-level BPE), {figures['parameters'] / 1e6:.1f} M parameters, bfloat16. Its use is to make compression"
            " methods comparable, not to write",
            "prose. The weights are under the project's licence, the texts keep theirs.", "",
            "## Training", "",
            f"Seed {figures['seed']}; AdamW, peak {figures['lr']}, cosine to 0, batch {BATCH} x {LENGTH},"
            f" router loss 0.01; {(figures['tokens_before'] + figures['tokens']) / 1e6:.2f} M tokens seen,"
            f" {figures['tokens'] / 1e6:.2f} M of them in the run that wrote this:", "",
            f"    {figures['command']}", "",
            "## Sources and licences", "", *sources, "",
            "The weights are a product of these texts; no text is contained.", "",
            "## Validation perplexity", "",
            f"Non-overlapping windows of {LENGTH} tokens, the first {VALID_WINDOWS} of each held-out file.", "",
            "| source | perplexity |", "|---|---|", *rows, "",
        ])
    )  # fmt: skip


def main(
    data: Annotated[Path, typer.Option(help="Folder of training and *.valid.* files.")],
    out: Annotated[Path, typer.Option(help="Folder of the trained model.")],
    start: Annotated[Path | None, typer.Option(help="Model folder to go on from.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to train on.")] = 20_000_000,
    tokens_before: Annotated[int, typer.Option(help="Tokens the --start model has seen, for the card.")] = 0,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    seed: int = 0,
) -> None:
    """Trains and saves the model with its card; with --tokens 0 only measures the --start model and writes the card."""
    train_files, valid_files = text_files(data)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(start) if start else make_tokenizer(train_files)
    model = MixtralForCausalLM.from_pretrained(start, dtype=torch.float32) if start else new_model(tokenizer)
    valid = {p.name.split(".")[0]: windows(p, tokenizer, VALID_WINDOWS) for p in valid_files}
    before = perplexities(model, valid) if start else {}
    steps = tokens // (BATCH * LENGTH)
    losses = train(model, training_batches(train_files, tokenizer, steps * BATCH, generator), lr) if steps else []
    after = perplexities(model, valid) if steps else before
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.model_max_length = LENGTH  # it has positions for more, and was never trained on them
    tokenizer.save_pretrained(out)
    listed = data / "sources.json"
    card(out, {
        "parameters": sum(p.numel() for p in model.parameters()), "seed": seed, "lr": lr,
        "tokens": steps * BATCH * LENGTH, "tokens_before": tokens_before,
        "sources": json.loads(listed.read_text()) if listed.is_file() else {p.name: "unstated" for p in train_files},
        "before": before, "after": after,
        "command": "python -m moesvd_quant.reference.train "
        + " ".join(shlex.quote(Path(a).name if "/" in a else a) for a in sys.argv[1:]),
    })  # fmt: skip
    print(json.dumps({"losses": losses[:1] + losses[-1:], "before": before, "after": after}))


def train(model, data: torch.Tensor, lr: float) -> list[float]:
    """Trains in place on windows (n, LENGTH), BATCH at a time; the loss of every step."""
    batches = data.split(BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, len(batches) // 50), len(batches))
    began, losses = time.time(), []
    with Progress(*Progress.get_default_columns(), TimeRemainingColumn()) as progress:
        task = progress.add_task("training", total=len(batches))
        for step, batch in enumerate(batches):
            loss = model(batch, labels=batch, output_router_logits=True).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            progress.update(task, advance=1)
            if step % 100 == 99:
                rate = (step + 1) * BATCH * LENGTH / (time.time() - began)
                recent = sum(losses[-100:]) / len(losses[-100:])
                print(f"step {step + 1}/{len(batches)} loss {recent:.4f} {rate:.0f} tokens/s", flush=True)
    return losses


if __name__ == "__main__":
    typer.run(main)
