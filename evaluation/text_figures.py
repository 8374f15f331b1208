"""What a model says of texts: perplexity, and how its predictions differ from the original's."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from .compare import require_same_tokenizer, walked
from .difference import Divergences, beside
from .inputs import EvalSpec, Text
from .kinds import kinds
from .opening import Report, streamed
from .perplexity import Logits, document_perplexity, perplexity


def text_figures(
    logits: Logits, texts: dict[str, Text], wanted: EvalSpec, original: Path | None, tokenizer: Any, device: str,
    progress: Report,
) -> dict[str, dict]:  # fmt: skip
    """{text: figures of each protocol, and "difference" from the original where there is one}."""
    found = {}
    for name, text in texts.items():
        if original is None:
            found[name] = _perplexity(logits, text, wanted, name, progress)
            continue
        found[name] = _compared(logits, text, wanted, original, name, tokenizer, device, progress)
        found[name] |= _perplexity(logits, replace(text, windows=None), wanted, name, progress)
    return found


def original_of(folder: Path, wanted: EvalSpec) -> Path | None:
    """The model to compare a folder's predictions with; None where none is wanted, or it is the folder's own."""
    from ..calibration.store import fingerprint

    if wanted.original is None or fingerprint(wanted.original) == fingerprint(folder):
        return None
    require_same_tokenizer(str(folder), folder, wanted.original)
    return wanted.original


def is_compared(figures: dict, original: Path) -> bool:
    """Whether the figures of a text say how the model differs from `original`, or are of a protocol that cannot."""
    from ..calibration.store import fingerprint

    return "ppl" not in figures or figures.get("difference", {}).get("original") == fingerprint(original)


def _perplexity(logits: Logits, text: Text, wanted: EvalSpec, name: str, progress: Report) -> dict:
    measured: dict = {}
    say = lambda done, total: progress(f"perplexity on {name}", done, total)  # noqa: E731
    if text.windows is not None:
        measured |= perplexity(logits, text.windows, wanted.batch_size, say).to_dict()
    if text.rolling is not None:
        measured["lm_eval"] = document_perplexity(
            logits, text.documents, text.rolling, text.context, wanted.batch_size, say
        )
    return measured


def _compared(
    logits: Logits, text: Text, wanted: EvalSpec, original: Path, name: str, tokenizer: Any, device: str,
    progress: Report,
) -> dict:  # fmt: skip
    """Perplexity on windows, and the difference from the original. One walk of each; of the original one layer is in
    memory, and then its output head."""
    from ..calibration.store import fingerprint
    from ..model.stream import precision_on

    if (windows := text.windows) is None:
        return {}
    say = lambda what, done, total: progress(f"original on {name}", done, total)  # noqa: E731
    first = streamed(original, precision_on(device), device, say)
    found = Divergences(windows, kinds(windows, tokenizer))
    layers = len(first.layer_names)
    with walked(first, windows):
        say("layers", layers, layers)
        compared = beside(logits, first.predictions(), found)
        measured = _perplexity(compared, replace(text, rolling=None), wanted, name, progress)
    return measured | {"difference": found.result().to_dict() | {"original": fingerprint(original)}}
