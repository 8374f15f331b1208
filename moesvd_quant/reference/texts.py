"""Files of text become windows of tokens: once, on disk, read from there."""

from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, List, Value, interleave_datasets, load_dataset
from transformers import PreTrainedTokenizerBase

from ..errors import MoesvdError

# Sources are drawn by size to this power: large ones lead, small ones are not drowned.
TEMPERATURE = 0.7
VALID_WINDOWS = 200


def text_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """(training, validation) files *.jsonl, packed or not (.gz, .xz, .zst); MoesvdError where none is to train on."""
    files = sorted(folder.glob("*.jsonl*"))
    train = [path for path in files if ".valid." not in path.name]
    if not train:
        raise MoesvdError(f"{folder}: no training files (*.jsonl or *.jsonl.gz without .valid. in their names)")
    return train, [path for path in files if ".valid." in path.name]


def windows(path: Path, tokenizer: PreTrainedTokenizerBase, length: int, cache: Path) -> Dataset:
    """All windows of a file: `input_ids`, `length` tokens.

    Documents (field `text`) are joined by the end-of-text token. Of each thousand, the last tokens fill no window.
    """
    texts = load_dataset("json", data_files=str(path), split="train", cache_dir=str(cache)).select_columns("text")
    return texts.map(
        _packed,
        batched=True,
        remove_columns="text",
        fn_kwargs={"tokenizer": tokenizer, "length": length},
        features=Features({"input_ids": List(Value("uint16"))}),
        desc=path.name,
    ).with_format("numpy")


def _packed(rows: dict, tokenizer: PreTrainedTokenizerBase, length: int) -> dict:
    documents = tokenizer(rows["text"], add_special_tokens=False, verbose=False).input_ids
    stream = [token for document in documents for token in (*document, tokenizer.eos_token_id)]
    return {"input_ids": np.array(stream[: len(stream) // length * length], dtype=np.uint16).reshape(-1, length)}


def mixed(sources: list[Dataset], seed: int) -> Dataset:
    """One pass: every window of the largest source once, those of smaller ones more often, by tempered size."""
    weights = np.array([len(source) for source in sources]) ** TEMPERATURE
    shares = (weights / weights.sum()).tolist()
    return interleave_datasets(sources, shares, seed=seed, stopping_strategy="all_exhausted")


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """A batch for a causal model: `input_ids` and `labels` (windows, length), int64."""
    tokens = torch.from_numpy(np.stack([row["input_ids"] for row in rows]).astype(np.int64))
    return {"input_ids": tokens, "labels": tokens}
