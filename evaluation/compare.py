"""Models beside their original: divergence of their predictions, and what they write."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ..errors import UsageError
from ..model.stream import Precision, precision_on
from .difference import Difference, difference
from .inputs import EvalSpec, read_text
from .kinds import KINDS, kinds
from .opening import Report, streamed
from .original import original_predictions, walk_over
from .table import Table

FLOOR = "its own dtype"  # the original, computed in the precision that its files have


@dataclass(frozen=True)
class Written:
    """What a model writes after a prompt, greedily. same: how many of its tokens are those of the original before the
    first one that differs."""

    model: str
    text: str
    same: int
    tokens: int


def compare(
    original: Path, others: dict[str, Path], wanted: EvalSpec, device: str, report: Report
) -> dict[str, dict[str, Difference]]:
    """{text: {model: its difference from the original}}. Models go layer by layer, so that no two are in memory.

    FLOOR stands for the original in its own dtype where that is not what is computed in: less than this no
    16-bit model of its kind can be told apart. UsageError for models whose tokenizers differ.
    """
    from ..model.opened import open_folder
    from ..model.tokenizer import load_tokenizer

    opened, precision = open_folder(original), precision_on(device)
    for name, folder in others.items():
        require_same_tokenizer(name, folder, original)
    tokenizer = load_tokenizer(original)
    texts = {name: read_text(source, wanted, tokenizer, opened.config) for name, source in wanted.texts.items()}
    models: dict[str, tuple[Path, Precision]] = {name: (folder, precision) for name, folder in others.items()}
    if isinstance(precision, torch.dtype) and opened.dtype != precision:
        models = {FLOOR: (original, opened.dtype)} | models
    found: dict[str, dict[str, Difference]] = {}
    for text, read in texts.items():
        windows = read.windows
        assert windows is not None
        found[text] = {}
        of = kinds(windows, tokenizer)
        for name, (folder, dtype) in models.items():
            first = original_predictions(original, windows, device, _named(report, f"original on {text}"))
            say = _named(report, f"{name} on {text}")
            other = streamed(folder, dtype, device, say)
            walk_over(other, windows)
            found[text][name] = difference(first, other.predictions(), windows, of, partial(say, "windows"))
    return found


def _named(report: Report, name: str) -> Report:
    """Tells which model is at work on which text."""
    return lambda what, done, total: report(f"{name}, {what}", done, total)


def require_same_tokenizer(name: str, folder: Path, original: Path) -> None:
    """UsageError where the tokens of two models are not the same."""
    from ..model.carried import tokenizer_digest

    if tokenizer_digest(folder) != tokenizer_digest(original):
        raise UsageError(f"{name}: has another tokenizer than {original}; only models of one can be compared")


def difference_table(differences: dict[str, Difference]) -> Table:
    """A row per model; divergences in thousandths of a nat per token."""
    columns = ["model", "mean", "median", "99 %", "99.9 %", "same top token %", "perplexity %", "95 % interval"]
    rows: list[list[str | float]] = []
    for name, one in differences.items():
        divergences = [_thousandths(value) for value in (one.mean, one.median, one.high99, one.high999)]
        change, low, high = (100 * one.change[key] for key in ("change", "low", "high"))
        rows.append([name, *divergences, round(100 * one.top1, 2), f"{change:+.2f}", f"{low:+.2f} to {high:+.2f}"])
    return Table("", columns, rows)


def kind_table(differences: dict[str, Difference]) -> Table:
    """Mean divergence by the kind of the predicted token, in thousandths of a nat; a row per model, and one of how
    frequent each kind is."""
    one = next(iter(differences.values()))
    known = [kind for kind in KINDS if kind in one.by_kind]
    shares: list[str | float] = ["share of tokens %"]
    shares += [f"{100 * one.by_kind[kind].tokens / one.tokens:.1f}" for kind in known]
    rows = [shares]
    rows += [[name, *(_thousandths(d.by_kind[kind].mean) for kind in known)] for name, d in differences.items()]
    return Table("", ["by kind of token", *known], rows)


def position_table(differences: dict[str, Difference]) -> Table:
    """Mean divergence in each quarter of the windows, in thousandths of a nat; a row per model."""
    columns = ["by place in a window", *(f"{name} quarter" for name in ("first", "second", "third", "last"))]
    rows: list[list[str | float]] = [[name, *map(_thousandths, one.by_position)] for name, one in differences.items()]
    return Table("", columns[: len(rows[0])], rows)


def _thousandths(value: float) -> float:
    return float(f"{1000 * value:.3g}")


@torch.no_grad()
def write_beside(
    original: Path, others: dict[str, Path], prompts: Sequence[str], tokens: int, device: str, report: Report
) -> list[list[Written]]:
    """What each model writes after each prompt, the original first; one model in memory at a time."""
    from ..model.load import load
    from ..model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(original)
    ids: dict[str, list[list[int]]] = {}
    for done, (name, folder) in enumerate({"original": original, **others}.items()):
        model, ids[name] = load(folder, device=device), []
        for prompt in prompts:
            given = tokenizer(prompt, return_tensors="pt").to(model.device)
            asked = {key: given[key] for key in ("input_ids", "attention_mask")}
            pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
            made = model.generate(**asked, max_new_tokens=tokens, do_sample=False, pad_token_id=pad)
            ids[name].append(made[0, asked["input_ids"].shape[1] :].tolist())
        report("writing", done + 1, len(others) + 1)
    return [
        [_written(name, tokenizer, own[at], ids["original"][at]) for name, own in ids.items()]
        for at in range(len(prompts))
    ]


def _written(name: str, tokenizer, ids: list[int], original: list[int]) -> Written:
    same = next((i for i, (a, b) in enumerate(zip(ids, original)) if a != b), min(len(ids), len(original)))
    before, after = (tokenizer.decode(part) for part in (ids[:same], ids[same:]))
    mark = " >>" if same < len(ids) and name != "original" else ""
    return Written(name, before + mark + after, same, len(ids))
