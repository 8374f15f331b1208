"""Text by name, file or folder, and the token windows that calibration and evaluation are made of."""

import difflib
import gzip
import hashlib
import io
import json
import random
import re
import sysconfig
from pathlib import Path

import pyarrow.parquet
import torch

SUFFIXES = (".txt", ".raw", ".tokens", ".jsonl", ".json", ".parquet")
FIELDS = ("text", "content", "sentence")  # where records keep their text, in order of preference
MIXTURE = ("mixture-wiki", "mixture-web", "mixture-books", "mixture-code")
NAMES = ("wikitext2", "ptb", "c4", "mixture", "demo")
JOINT = "\n\n"  # between documents, as the GPTQ papers do with the lines of WikiText-2
STREAMED_CHARS = 16_000_000  # of a streamed set's train side: about 4 M tokens
PIECE_CHARS = 20_000  # longer documents are cut for calibration, so that a book can be sampled in places

# {name: (arguments of load_dataset, train split, test split)}. PTB has a loading script, which datasets >= 4
# refuses: its converted branch is read. Without a test split every twentieth document is held out.
_HUB: dict[str, tuple[dict, str, str | None]] = {
    "wikitext2": (dict(path="Salesforce/wikitext", name="wikitext-2-raw-v1"), "train", "test"),
    "ptb": (dict(path="ptb-text-only/ptb_text_only", revision="refs/convert/parquet"), "train", "test"),
    "c4": (dict(path="allenai/c4", name="en", streaming=True), "train", "validation"),
    "mixture-wiki": (dict(path="wikimedia/wikipedia", name="20231101.en", streaming=True), "train", None),
    "mixture-books": (dict(path="manu/project_gutenberg", streaming=True), "en", None),
    "mixture-code": (dict(path="codeparrot/codeparrot-clean-train", streaming=True), "train", None),
}
_HUB["mixture-web"] = _HUB["c4"]
HELD_OUT = 20
TEST_DOCUMENTS = 1100  # of a streamed set's test side; GPTQ takes as many of C4's


class TextError(ValueError):
    """A text that cannot be read or is too short; the message says which and what is needed."""


def load_documents(source: str, split: str) -> list[str]:
    """Documents of a source, or of several joined by commas, in a fixed order; split is "train" or "test".

    A source is one of NAMES or MIXTURE, a file with one of SUFFIXES (or that and .gz), or a folder of such
    files. Local text serves both splits as it is; .txt, .raw and .tokens are one document, byte for byte.
    TextError where a source is unknown, unreachable, damaged or empty.
    """
    if split not in ("train", "test"):
        raise TextError(f"split {split!r}: must be train or test")
    return [document for name in sources(source) for document in _one(name, split)]


def sources(source: str) -> list[str]:
    """The single sources of a comma-joined list; mixture becomes its four parts."""
    names = [source] if source and Path(source).exists() else [part.strip() for part in source.split(",")]
    if "" in names:
        raise TextError(f"source {source!r}: an empty name; known are {', '.join(NAMES)}, files and folders")
    return [part for name in names for part in (MIXTURE if name == "mixture" else (name,))]


def token_windows(documents: list[str], tokenizer, length: int) -> torch.Tensor:
    """The whole text as non-overlapping windows, int64 (n, length); the last short one is dropped.

    No special tokens are added. TextError where there is less than one window.
    """
    ids = _tokens(tokenizer, [JOINT.join(documents)])
    if length < 1 or len(ids) < length:
        raise TextError(f"text too short: {len(ids)} tokens found, {max(length, 1)} needed for one window")
    return torch.tensor(ids[: len(ids) // length * length], dtype=torch.int64).view(-1, length)


def calibration_windows(source: str, tokenizer, samples: int, length: int, seed: int) -> torch.Tensor:
    """`samples` windows of `length` tokens from the train side of a source, int64 (samples, length).

    Several sources give equal shares (the first ones more by one where it does not divide). TextError where
    one has too little text, saying how many windows it has.
    """
    names = sources(source)
    if length < 1 or samples < len(names):
        raise TextError(f"samples={samples}, length={length}: each of {len(names)} sources needs a sample")
    windows = []
    for i, name in enumerate(names):
        share = samples // len(names) + (i < samples % len(names))
        # Seeded by place in the list and not by name: a path must not change what is drawn.
        windows.append(_draw(name, tokenizer, share, length, random.Random(f"{seed}/{i}")))
    order = list(range(samples))
    random.Random(f"{seed}/order").shuffle(order)  # so that each batch sees every source
    return torch.cat(windows)[order]


def digest(windows: torch.Tensor) -> str:
    """sha256 (hex) over shape and token ids."""
    data = windows.to(torch.int64).contiguous().cpu().numpy().astype("<i8")
    return hashlib.sha256(repr(tuple(windows.shape)).encode() + data.tobytes()).hexdigest()


def _draw(name: str, tokenizer, share: int, length: int, rng: random.Random) -> torch.Tensor:
    size = max(PIECE_CHARS, 8 * length)
    pieces = [piece for document in load_documents(name, "train") for piece in _pieces(document, size)]
    rng.shuffle(pieces)
    ids: list[int] = []
    # Twice what is needed leaves the places of windows to chance; a large corpus is not tokenized whole.
    for start in range(0, len(pieces), 64):
        ids += _tokens(tokenizer, [piece + JOINT for piece in pieces[start : start + 64]])
        if len(ids) >= 2 * share * length:
            break
    found = len(ids) // length
    if found < share:
        raise TextError(f"{name}: {len(ids)} tokens make {found} windows of {length}; {share} are needed")
    # Gaps before the windows: sorted places in what is left over keep windows apart, all layouts as likely.
    gaps = sorted(rng.choices(range(len(ids) - share * length + 1), k=share))
    starts = [gap + i * length for i, gap in enumerate(gaps)]
    return torch.tensor([ids[start : start + length] for start in starts], dtype=torch.int64)


def _pieces(document: str, size: int) -> list[str]:
    """The document in pieces of at least `size` characters, cut at line ends."""
    pieces, start = [], 0
    while len(document) - start > size:
        end = document.find("\n", start + size) + 1
        if end == 0:
            break
        pieces.append(document[start:end])
        start = end
    return [*pieces, document[start:]]


def _tokens(tokenizer, texts: list[str]) -> list[int]:
    batch = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [token for ids in batch for token in ids]


def _one(name: str, split: str) -> list[str]:
    if name == "demo":
        documents = _demo(split)
    elif name in _HUB:
        documents = _hub(name, split)
    elif Path(name).is_dir():
        files = sorted(path for path in Path(name).iterdir() if _suffix(path) in SUFFIXES)
        documents = [document for path in files for document in _file(path)]
    elif Path(name).is_file():
        documents = _file(Path(name))
    else:
        near = difflib.get_close_matches(name, NAMES, 1) or NAMES
        raise TextError(f"{name}: no such text, file or folder; did you mean {' or '.join(near)}?")
    if not any(documents):
        raise TextError(f"{name}: holds no text (files read end in {', '.join(SUFFIXES)}, or that and .gz)")
    return documents


def _suffix(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix


def _file(path: Path) -> list[str]:
    kind = _suffix(path)
    if kind not in SUFFIXES:
        raise TextError(f"{path}: text files end in {', '.join(SUFFIXES)}, or that and .gz")
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
        if kind == ".parquet":
            records = pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()
        elif kind == ".jsonl":
            # Not splitlines(): JSON strings may hold U+2028 and its like unescaped.
            records = [json.loads(line) for line in data.decode().split("\n") if line.strip()]
        elif kind == ".json":
            records = json.loads(data.decode())
        else:
            return [data.decode()]
    except (OSError, EOFError, ValueError) as error:  # of gzip, UTF-8, JSON and Arrow
        raise TextError(f"{path}: cannot be read: {error}") from error
    if not isinstance(records, list):
        raise TextError(f"{path}: must hold a list of texts or of records")
    return [_field(record, f"{path}, record {i + 1}") for i, record in enumerate(records)]


def _field(record, where: str) -> str:
    if isinstance(record, str):
        return record
    for field in FIELDS if isinstance(record, dict) else ():
        if isinstance(record.get(field), str):
            return record[field]
    raise TextError(f"{where}: none of the text fields {', '.join(FIELDS)}")


def _hub(name: str, split: str) -> list[str]:
    from datasets import load_dataset

    arguments, train, test = _HUB[name]
    streaming = arguments.get("streaming", False)
    documents, size = [], 0
    try:
        for i, record in enumerate(
            load_dataset(split=test if split == "test" and test else train, **arguments)
        ):
            if test is None and (i % HELD_OUT == 0) != (split == "test"):
                continue
            documents.append(_field(record, f"record {i + 1}"))
            size += len(documents[-1])
            full = split == "test" and len(documents) == TEST_DOCUMENTS
            if streaming and (full or size >= STREAMED_CHARS):
                break
    except Exception as error:  # the hub's clients raise errors of many libraries
        raise TextError(
            f"{name}: {arguments['path']} cannot be read: {error}; or give a local file"
        ) from error
    if not streaming and split == "train":
        return ["\n".join(row.rstrip("\n") for row in documents)]  # rows are lines: keep their order
    return documents


def _demo(split: str) -> list[str]:
    """Text that every Python carries: the language reference and the manuals in its modules' docstrings."""
    from pydoc_data.topics import topics

    texts = dict(topics)
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        found = re.match(
            r'(?:#.*\n|\s)*r?"""(.{1000,}?)"""', path.read_bytes().decode(errors="replace"), re.S
        )
        texts |= {"module " + path.stem: found[1]} if found and '"""' not in found[1] else {}
    # By size, so that both sides get long and short topics; every fourth is for testing.
    order = sorted(texts, key=lambda topic: (-len(texts[topic]), topic))
    return [texts[topic] for i, topic in enumerate(order) if (i % 4 == 3) == (split == "test")]
