"""The tokenizer of a model folder."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from ..errors import ModelError
from .opened import open_folder


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a model folder, which knows how many tokens the model has embeddings of: `embedding_rows`.

    ModelError where it has none that can be read without code of its own.
    """
    rows = open_folder(folder).embedding_rows
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, ImportError) as error:
        raise ModelError(f"{folder}: {_why(Path(folder))} ({str(error).strip().splitlines()[0]})") from error
    tokenizer.embedding_rows = rows
    return tokenizer


def _why(folder: Path) -> str:
    if (folder / "tokenizer.json").is_file():
        return "its tokenizer cannot be read"
    return (
        "its tokenizer cannot be read without code or packages of its own, which are not used; it needs a "
        "tokenizer.json: load the tokenizer where it works and save it there with `save_pretrained`"
    )
