"""Text, from a known name or local files, as windows of tokens."""

import hashlib
import importlib
import inspect
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch

from ..runtime.modeling_moesvd import file_digest
from .rows import TextError, texts_of

PLAIN = (".txt", ".raw", ".tokens")
TABULAR = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class HubText:
    """A text of the hub that loads without code of its own."""

    repository: str
    configuration: str | None
    splits: dict[str, str]  # ours (train, test) -> theirs
    column: str = "text"
    documents: int | None = None  # at most so many
    revision: str | None = None
    joiner: str = "\n\n"  # between documents, as the perplexities in the literature have it


HUB = {
    "wikitext2": HubText("Salesforce/wikitext", "wikitext-2-raw-v1", {"train": "train", "test": "test"}),
    "ptb": HubText(
        "ptb-text-only/ptb_text_only", "penn_treebank", {"train": "train", "test": "test"}, "sentence",
        revision="refs/convert/parquet", joiner=" ",
    ),
    "c4": HubText("allenai/c4", "en", {"train": "train", "test": "validation"}, documents=1100, joiner=" "),
    "books": HubText("manu/project_gutenberg", None, {"train": "en", "test": "en"}, documents=500),
    "code": HubText(
        "codeparrot/codeparrot-clean-valid", None, {"train": "train", "test": "train"}, "content", documents=2000
    ),
}  # fmt: skip
MIXTURE = ("wikitext2", "c4", "books", "code")
DEMO_MODULES = (
    "argparse", "asyncio", "ast", "collections", "configparser", "csv", "datetime", "decimal", "difflib", "doctest",
    "enum", "fractions", "functools", "heapq", "inspect", "itertools", "json", "logging", "mailbox", "os", "pickle",
    "pickletools", "random", "re", "shutil", "statistics", "string", "subprocess", "tarfile", "textwrap", "threading",
    "traceback", "typing", "unittest", "urllib.request", "zipfile",
)  # fmt: skip

DEMO_CODE = ("dataclasses", "heapq", "json.decoder", "textwrap")


def sources_of(source: str) -> list[str]:
    """The parts of a comma-joined source; `mixture` stands for several. A path that exists is one part, with its
    commas."""
    if Path(source).exists():
        return [source]
    parts = [part.strip() for part in source.split(",") if part.strip()]
    return [name for part in parts for name in (MIXTURE if part == "mixture" else (part,))]


def documents(source: str, split: str = "train", tokenizer=None) -> Iterator[str]:
    """Documents of one source, streamed. tokenizer: for conversations. TextError where it is neither a known name nor a
    readable file."""
    if source == "demo":
        yield from _demo(split)
    elif source == "demo-code":
        yield from _demo_code()
    elif source in HUB:
        yield from _hub(source, split)
    elif Path(source).exists():
        for file in text_files(Path(source)):
            yield from texts_of(local_rows(file), str(file), tokenizer)
    else:
        names = ", ".join(["demo", "demo-code", "mixture", *HUB])
        raise TextError(f"{source}: no such file or folder, and no known text ({names})")


def load_documents(source: str, split: str = "test", tokenizer=None) -> list[str]:
    """All documents of a comma-joined source."""
    return [text for part in sources_of(source) for text in documents(part, split, tokenizer)]


def text_digest(source: str, split: str = "test") -> str:
    """sha256 of what a comma-joined source is read from: the contents of files, the place of a text on the hub."""
    digests = []
    for part in sources_of(source):
        if part not in HUB and Path(part).exists():
            digests += [file_digest(file) for file in text_files(Path(part))]
        else:
            given = HUB[part] if part in HUB else list(documents(part, split))
            digests.append(hashlib.sha256(repr(given).encode()).hexdigest())
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


def joiner_of(source: str) -> str:
    """What stands between the documents of a source in `token_windows`."""
    return HUB[source].joiner if source in HUB else "\n\n"


def token_windows(texts: Iterable[str], tokenizer, length: int, joiner: str = "\n\n") -> torch.Tensor:
    """Non-overlapping windows (n, length) int64 of the whole text: documents joined and tokenised without special
    tokens; the last, short window is dropped. TextError where there is not one."""
    ids = encode(tokenizer, joiner.join(texts))
    count = len(ids) // length
    if count == 0:
        raise TextError(
            f"the text has {len(ids)} tokens; one window needs {length}. Give more text or a shorter length"
        )
    return torch.tensor(ids[: count * length], dtype=torch.long).view(count, length)


def calibration_windows(source: str, tokenizer, samples: int, length: int, seed: int) -> torch.Tensor:
    """(samples, length) int64: equal shares of every part of the source, windows at random places.

    Documents are taken in an order shuffled by seed, and tokenised only until there are four times as many
    windows as wanted, of which a random choice is taken. TextError where there are too few.
    """
    parts = sources_of(source)
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for index, part in enumerate(parts):
        wanted = samples // len(parts) + (index < samples % len(parts))
        chosen.append(_sample(part, tokenizer, wanted, length, generator))
    windows = torch.cat(chosen)
    return windows[torch.randperm(len(windows), generator=generator)]


def _sample(source, tokenizer, wanted, length, generator):
    texts = list(documents(source, "train", tokenizer))
    order = torch.randperm(len(texts), generator=generator).tolist()
    ids: list[int] = []
    for index in order:
        ids += encode(tokenizer, texts[index] + "\n\n")
        if len(ids) >= 4 * wanted * length:
            break
    count = len(ids) // length
    if count < wanted:
        raise TextError(
            f"{source}: {len(ids)} tokens give {count} windows of {length}; {wanted} are wanted. "
            "Give more text, fewer calibration.samples or a shorter calibration.length"
        )
    places = torch.randperm(count, generator=generator)[:wanted]
    return torch.tensor(ids[: count * length], dtype=torch.long).view(count, length)[places]


def encode(tokenizer, text: str) -> list[int]:
    """Token ids without special tokens. TextError for a token that the model has no embedding of."""
    return known(tokenizer, tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def known(tokenizer, ids: list[int]) -> list[int]:
    """The ids. TextError where the model that the tokenizer was loaded for has no embedding of one."""
    rows = getattr(tokenizer, "embedding_rows", None)
    if rows is not None and ids and max(ids) >= rows:
        token = max(ids)
        shown = tokenizer.convert_ids_to_tokens(token)
        raise TextError(
            f"{tokenizer.name_or_path}: the text has token {token} ({shown!r}), and the embedding has {rows} rows: "
            "resize it, or use the tokenizer that belongs to the model"
        )
    return ids


def text_files(path: Path) -> list[Path]:
    """A file, or the readable files of a folder in order of name."""
    if path.is_file():
        if _ending(path) is None:
            raise TextError(f"{path}: not a text file ({', '.join([*PLAIN, *TABULAR])}, also .gz)")
        return [path]
    found = sorted(file for file in path.iterdir() if _ending(file))
    if not found:
        raise TextError(f"{path}: no text files in this folder ({', '.join([*PLAIN, *TABULAR])}, also .gz)")
    return found


def _ending(path: Path) -> str | None:
    name = path.name.removesuffix(".gz")
    return next((end for end in (*PLAIN, *TABULAR) if name.endswith(end)), None)


def local_rows(path: Path) -> Iterator[dict]:
    """Rows of a text or table file, streamed; a plain file is one row `text`, line ends kept."""
    from datasets import load_dataset

    kind = TABULAR.get(_ending(path) or "", "text")
    more = {"sample_by": "document"} if kind == "text" else {}
    try:
        yield from load_dataset(kind, data_files=str(path), split="train", streaming=True, **more)
    except Exception as error:  # datasets wraps every parser's own errors
        raise TextError(f"{path}: cannot be read: {error}") from error


def _hub(name: str, split: str) -> Iterator[str]:
    from datasets import load_dataset

    text = HUB[name]
    _require_address(name)
    where = dict(split=text.splits[split], revision=text.revision, streaming=True)
    try:
        for row in islice(load_dataset(text.repository, text.configuration, **where), text.documents):
            yield row[text.column]
    except Exception as error:  # network, hub and parser errors of many kinds
        raise TextError(
            f"{name}: {text.repository} could not be read from the hub ({error}); without network give a local file, "
            "for example calibration.dataset=FILE"
        ) from error


def _require_address(name: str) -> None:
    """TextError at once where the hub's address is not known, so that there is no network: its client would try again
    for half a minute. Behind a proxy nobody but the proxy may know it."""
    from huggingface_hub import constants

    try:
        if not getproxies():
            socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except socket.gaierror as error:
        raise TextError(
            f"{name}: is read from {constants.ENDPOINT}, which cannot be reached ({error}); without network give "
            "a local file, for example calibration.dataset=FILE"
        ) from error


def _demo_code() -> Iterator[str]:
    """Source code that every Python carries: text unlike `demo`."""
    for name in DEMO_CODE:
        yield inspect.getsource(importlib.import_module(name))


def _demo(split: str) -> Iterator[str]:
    """Text that every Python carries: the language reference of pydoc, and docstrings of its modules."""
    from pydoc_data.topics import topics

    texts = list(dict.fromkeys(text for _, text in sorted(topics.items())))  # some stand under several names
    for name in DEMO_MODULES:
        module = importlib.import_module(name)
        owned = [m for _, m in inspect.getmembers(module) if getattr(m, "__module__", None) == name]
        docs = {inspect.getdoc(member) or "" for member in [module, *owned]}
        texts.append("\n\n".join(sorted(doc for doc in docs if len(doc) > 200)))
    for index, text in enumerate(texts):
        held_out = index % 5 == 0
        if text and held_out == (split == "test"):
            yield text
