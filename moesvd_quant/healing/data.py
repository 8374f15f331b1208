"""Text to train on: packed windows, some of them held out, none of them from what the recipe evaluates on."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..calibration.rows import TextError, texts_of
from ..calibration.text import HUB, documents, encode, load_documents, sources_of

NGRAM = 24  # tokens that have to follow each other to count as copied; less in windows that are short
LEAK_SHARE = 0.01  # of an evaluation text's n-grams


@dataclass(frozen=True)
class Training:
    """Token windows (n, length) int64: to train on, in order, and held out to judge by."""

    train: torch.Tensor
    validation: torch.Tensor

    @property
    def digest(self) -> str:
        parts = b"".join(windows.numpy().tobytes() for windows in (self.train, self.validation))
        return hashlib.sha256(repr((self.train.shape, self.validation.shape)).encode() + parts).hexdigest()

    def with_written(self, written: torch.Tensor, share: float, seed: int) -> "Training":
        """A share of what is trained on in exchange for windows (n, any length) int64 that the model wrote itself: each
        of them as often as it takes."""
        length, count = self.train.shape[1], round(share * len(self.train))
        text = written.reshape(-1)[: written.numel() // length * length].view(-1, length)
        if not len(text) or not count:
            return self
        generator = torch.Generator().manual_seed(seed)
        rounds = [torch.randperm(len(text), generator=generator) for _ in range(-(-count // len(text)))]
        mixed = torch.cat([self.train[: len(self.train) - count], text[torch.cat(rounds)[:count]]])
        return Training(mixed[torch.randperm(len(mixed), generator=generator)], self.validation)


def training_windows(source: str, tokenizer, wanted: int, held_out: int, length: int, seed: int) -> Training:
    """At most `wanted` windows to train on and `held_out` ones to judge by, equal shares of each part of the source.

    Documents are packed end to end in an order shuffled by seed; those at the front are held out. Fewer windows than
    wanted are seen several times. TextError where there are none to train on.
    """
    parts = sources_of(source)
    generator = torch.Generator().manual_seed(seed)
    train, validation = [], []
    for index, part in enumerate(parts):
        share = [total // len(parts) + (index < total % len(parts)) for total in (held_out, wanted)]
        packed = _packed(part, tokenizer, sum(share), length, generator)
        if len(packed) <= share[0]:
            raise TextError(
                f"{part}: {len(packed)} windows of {length} tokens; {share[0]} are held out for validation and more "
                "are needed to train on. Give more text, fewer lora.validation or a shorter lora.length"
            )
        validation.append(packed[: share[0]])
        train.append(packed[share[0] :])
    joined = torch.cat(train)
    return Training(joined[torch.randperm(len(joined), generator=generator)], torch.cat(validation))


def _packed(source: str, tokenizer, wanted: int, length: int, generator) -> torch.Tensor:
    texts = list(training_documents(source, tokenizer))
    ids: list[int] = []
    for index in torch.randperm(len(texts), generator=generator).tolist():
        ids += encode(tokenizer, texts[index] + "\n\n")
        if len(ids) >= wanted * length:
            break
    count = min(wanted, len(ids) // length)
    return torch.tensor(ids[: count * length], dtype=torch.long).view(count, length)


def training_documents(source: str, tokenizer) -> Iterator[str]:
    """Documents of a source: a known name, local files, or the name of a dataset on the hub (owner/name, its split
    train). Rows hold `text`, `messages` (the tokenizer's chat template is applied), or Alpaca's columns."""
    if source in HUB or source in ("demo", "demo-code"):
        yield from documents(source, "train")
    elif Path(source).exists():
        yield from documents(source, "train", tokenizer)
    elif source.count("/") == 1 and not source.startswith((".", "~")):
        yield from texts_of(_hub_rows(source), source, tokenizer)
    else:
        yield from documents(source, "train")  # says which names there are


def _hub_rows(name: str) -> Iterator[dict]:
    from datasets import load_dataset

    try:
        yield from load_dataset(name, split="train", streaming=True)
    except Exception as error:  # network, hub and parser errors of many kinds
        raise TextError(f"{name}: no such file, and the hub could not be read ({error}); give a local file") from error


def refuse_leaks(training: Training, texts: dict[str, str], tokenizer) -> None:
    """TextError where an evaluation text {name: source} is in the training windows: by content, not by name."""
    length = training.train.shape[1]
    size = min(NGRAM, length // 2)
    whole = (length - size + 1) / length  # of the n-grams of a text that is cut into windows, those inside one
    known = np.unique(np.concatenate([ngrams(ids, size) for ids in training.train.numpy()]))
    for name, source in texts.items():
        found = ngrams(
            np.array(encode(tokenizer, "\n\n".join(load_documents(source, tokenizer=tokenizer))), dtype=np.int64), size
        )
        share = min(1.0, float(np.isin(found, known).mean()) / whole) if len(found) else 0.0
        if share > LEAK_SHARE:
            raise TextError(
                f"evaluate.perplexity: {share:.1%} of {name} ({source}) stands in the text that lora trains on; "
                "evaluate on held-out text, or train on other text (lora.dataset)"
            )


def ngrams(ids: np.ndarray, size: int) -> np.ndarray:
    """A 64-bit hash of every run of `size` tokens of ids (n,)."""
    if len(ids) < size:
        return np.zeros(0, dtype=np.uint64)
    ids = ids.astype(np.uint64) + np.uint64(1)
    powers = np.cumprod(np.full(size, 0x9E3779B97F4A7C15, dtype=np.uint64))
    hashes = np.zeros(len(ids) - size + 1, dtype=np.uint64)
    for offset, power in enumerate(powers):
        hashes += ids[offset : offset + len(hashes)] * power
    return hashes
