"""What is measured on, and all that a figure depends on."""

import hashlib
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..errors import UsageError
from ..model.positions import positions, usual_length
from ..recipe.recipe import Evaluate
from ..recipe.tasks import data_folder
from ..runtime.modeling_moesvd import file_digest
from .perplexity import PROTOCOLS, rolling_windows
from .zero_shot import require_tasks


@dataclass(frozen=True)
class EvalSpec:
    """What to measure of a model folder."""

    texts: dict[str, str] = field(default_factory=dict)  # {name: source} for perplexity
    protocols: tuple[str, ...] = ("gptq",)  # of PROTOCOLS
    length: int | None = None  # tokens per window; None: `usual_length` of the model
    batch_size: int | None = None
    stream: bool | None = None  # one layer in memory at a time; None: where the model does not fit
    tasks: tuple[str, ...] = ()  # of lm-eval, `zero-shot` for the paper's seven
    task_data: str | None = None  # folder of local files; None: lm-eval loads from the hub
    limit: int | None = None  # documents per task
    run_code: bool = False  # run programs that the model writes, where a task does
    peak: bool = False  # memory at the peak of loading and generating, in a fresh process
    original: Path | None = None  # folder of the model that predictions are compared with, window by window


@dataclass(frozen=True)
class Text:
    """A text as the model is to see it. windows: (n, length) int64 of protocol `gptq`; rolling: inputs and targets of
    protocol `lm-eval`; each None where it is not wanted."""

    documents: list[str]
    windows: torch.Tensor | None
    rolling: tuple[torch.Tensor, torch.Tensor] | None
    context: int  # tokens that the model sees at once in `lm-eval`


def read_text(source: str, wanted: EvalSpec, tokenizer, config) -> Text:
    """Reads and tokenises a text. TextError and UsageError say what cannot be measured on it."""
    from ..calibration.text import joiner_of, load_documents, token_windows

    documents = load_documents(source, "test", tokenizer)
    windows = rolling = None
    if "gptq" in wanted.protocols:
        length = window_length(wanted, config, tokenizer)
        windows = token_windows(documents, tokenizer, length, joiner_of(source))
    context = wanted.length or positions(config)
    if "lm-eval" in wanted.protocols:
        rolling = rolling_windows(documents, tokenizer, context)
    return Text(documents, windows, rolling, context)


def window_length(wanted: EvalSpec, config, tokenizer) -> int:
    """Tokens of a window of protocol `gptq`."""
    return wanted.length or usual_length(config, tokenizer)


def spec_of(asked: Evaluate) -> EvalSpec:
    """What a recipe asks to measure."""
    length = None if asked.length == "auto" else asked.length
    return EvalSpec(asked.texts(), ("gptq",), length, None, None, *asked.wanted_tasks())


def require_possible(wanted: EvalSpec) -> None:
    """UsageError for a protocol that there is none of, TaskError for a task that cannot be asked."""
    require_tasks(wanted.tasks, wanted.task_data, wanted.run_code)
    if unknown := sorted(set(wanted.protocols) - set(PROTOCOLS)):
        raise UsageError(f"protocol {', '.join(unknown)}: is none of {', '.join(PROTOCOLS)}")


def protocol_of(folder: Path, wanted: EvalSpec, device: str) -> dict[str, Any]:
    """How figures are measured, and all that they depend on beside the weights: the tokenizer, the texts by their
    content, what computes. A figure that is kept is used again only where all of it is the same."""
    from ..calibration.text import text_digest
    from ..model.carried import tokenizer_digest
    from ..model.opened import open_folder
    from ..model.stream import precision_on
    from ..model.tokenizer import load_tokenizer

    opened, precision = open_folder(folder), precision_on(device)
    versions = {name: version(name) for name in ("torch", "transformers", "lm_eval", "moesvd_quant")}
    return {
        "perplexity": {key: PROTOCOLS[key] for key in wanted.protocols},
        "length": window_length(wanted, opened.config, load_tokenizer(folder)),
        "dtype": str(precision if isinstance(precision, torch.dtype) else opened.dtype),
        "tokenizer": tokenizer_digest(folder),
        "texts": {name: {"source": s, "digest": text_digest(s)} for name, s in wanted.texts.items()},
        "computed": versions | {"device": torch.device(device).type, "threads": torch.get_num_threads()},
    }


def data_digest(given: str | None) -> str | None:
    """sha256 over the files of the folder with task data (`data_folder`); None without one."""
    folder = data_folder(given)
    if folder is None:
        return None
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    found = [(str(path.relative_to(folder)), file_digest(path)) for path in files]
    return hashlib.sha256(repr(found).encode()).hexdigest()
