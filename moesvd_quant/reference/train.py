"""Trains a reference Mixture of Experts from random weights, in as many sittings as it takes.

make train-reference TRAIN="--data FOLDER [--minutes M] [--kind fine]"

FOLDER holds *.jsonl, *.jsonl.gz or *.jsonl.xz (field `text`), one file per source; those with `.valid.` in their names
are only measured on. An optional sources.json in it, {name: "origin, licence"}, goes to the card. The same command
again goes on from its own checkpoint. To train on less text, give a folder of shorter files:

zcat A.jsonl.gz | head -n 5000 | xz -9 > less/A.jsonl.xz
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
from transformers import AutoTokenizer

from ..errors import MoesvdError
from ..model.named import resolve_device
from . import path as embedded
from .kinds import Kind, config_of
from .publishing import Story, publish
from .texts import VALID_WINDOWS, mixed, text_files, windows
from .training import SEED, Training


def main(
    data: Annotated[Path, typer.Option(help="Folder of training and *.valid.* files.")],
    out: Annotated[Path, typer.Option(help="Folder of models, and of what going on needs.")] = Path("train-out"),
    kind: Annotated[Kind, typer.Option(help="Eight wide experts, or 64 fine ones and a shared one.")] = Kind.mixtral,
    tokens: Annotated[int, typer.Option(help="Tokens to train on, all sittings together.")] = 400_000_000,
    minutes: Annotated[float, typer.Option(help="End this sitting, with a cooled model, after so many.")] = math.inf,
    device: Annotated[str, typer.Option(help="auto: a GPU where there is one.")] = "auto",
    batch: Annotated[int, typer.Option(help="Windows of a step.")] = 16,
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
) -> None:
    """Trains, saves the model in OUT/KIND with its card, and prints its perplexities."""
    end = time.monotonic() + 60 * minutes
    place = torch.device(resolve_device(device))
    train_files, valid_files = text_files(data)
    # The embedded model's own: perplexities per token of all reference models can be compared.
    tokenizer = AutoTokenizer.from_pretrained(embedded())
    cache = out / "windows"
    learnt = mixed([windows(file, tokenizer, length, cache) for file in train_files], SEED)
    valid = {file.name.split(".")[0]: windows(file, tokenizer, length, cache) for file in valid_files}
    valid = {name: text.take(min(VALID_WINDOWS, len(text))) for name, text in valid.items()}
    config = config_of(kind, tokenizer, length)
    steps = tokens // (batch * length)
    checkpoint = Training(config, learnt, out / f"{kind}-checkpoints", batch, steps, place, end).run()
    listed = data / "sources.json"
    sources = json.loads(listed.read_text()) if listed.is_file() else {file.name: "unstated" for file in train_files}
    given = (Path(word).name if "/" in word else word for word in sys.argv[1:])
    command = f"make train-reference TRAIN={shlex.quote(shlex.join(given))}"
    found = publish(checkpoint, out / kind, tokenizer, valid, Story(kind, batch, length, sources, command), place)
    print(json.dumps({name: round(value, 2) for name, value in found.items()}))


if __name__ == "__main__":
    try:
        typer.run(main)
    except MoesvdError as error:
        sys.exit(f"error: {error}")
