"""Perplexity by named protocols, of a model in memory or of one that streams layer by layer."""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ..calibration.text import known
from ..errors import UsageError

# What the figures in papers mean; a record names the protocol it was made by.
PROTOCOLS = {
    "gptq": "whole text, non-overlapping windows, token level, the first token of a window is not predicted",
    "lm-eval": "each document by itself, every token predicted once (the first from the tokenizer's prefix token), "
    "windows as lm-eval rolls them; per word and per UTF-8 byte of the document as it was given",
}
PROTOCOL = PROTOCOLS["gptq"]
BATCH_TOKENS = 16384  # at once, where no batch size is asked for
RESAMPLES, CONFIDENCE = 2000, 0.95
LATE = 0.1  # nats that the end of windows may be harder than their beginning, however much text there is
SPREAD = 3.0  # nats, about: standard deviation of the losses of tokens

# Logits (batch, length, vocabulary) of each batch of windows (n, length), in order.
Logits = Callable[[torch.Tensor, int], Iterable[torch.Tensor]]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Perplexity:
    ppl: float
    nll: float  # nats per predicted token
    tokens: int  # predicted tokens
    windows: int
    length: int
    interval: tuple[float, float] | None  # 95 % bootstrap interval of ppl over windows; None for a single window
    window_nll: list[float]  # nats per predicted token of each window: what two models are compared by
    quarters: list[float]  # nats per predicted token in each quarter of the windows, the first one first

    def to_dict(self) -> dict:
        return asdict(self)


def in_memory(model) -> Logits:
    """Logits of a causal model, batch by batch."""

    def logits(windows: torch.Tensor, batch_size: int) -> Iterator[torch.Tensor]:
        device = next(model.parameters()).device
        for batch in windows.split(batch_size):
            yield model(input_ids=batch.to(device), use_cache=False).logits

    return logits


@torch.no_grad()
def perplexity(
    logits: Logits,
    windows: torch.Tensor,
    batch_size: int | None = None,
    progress: Progress = lambda done, total: None,
) -> Perplexity:
    """Protocol `gptq`: perplexity over token windows (n, length), int64.

    Losses are float32, summed in float64 window by window, so that the batch size does not matter.
    ValueError names the first window whose loss is not finite.
    """
    count, length = windows.shape
    sums, each = torch.zeros(length - 1, dtype=torch.float64), []
    for loss in _losses(logits, windows, windows[:, 1:], batch_size, progress):
        sums += loss
        each.append(float(loss.sum()) / (length - 1))
    totals = np.array(each)
    nll = float(totals.mean())
    quarters = [float(part.mean()) for part in (sums / count).tensor_split(4)]
    return Perplexity(_exp(nll), nll, count * (length - 1), count, length, _interval(totals), each, quarters)


def too_long(quarters: list[float], tokens: int) -> bool:
    """Whether a model seems to know windows only in part: more context makes what comes late easier to predict, unless
    the model was never trained on positions so late. Differences within two standard errors are chance. quarters,
    tokens: of `Perplexity`."""
    chance = 2 * SPREAD * math.sqrt(2 * len(quarters) / tokens)
    return quarters[-1] > quarters[0] + LATE + chance


@torch.no_grad()
def document_perplexity(
    logits: Logits,
    documents: list[str],
    rolling: tuple[torch.Tensor, torch.Tensor],
    length: int,
    batch_size: int | None = None,
    progress: Progress = lambda done, total: None,
) -> dict:
    """Protocol `lm-eval`: {"word_ppl", "byte_ppl", "bits_per_byte", "documents", "words", "bytes", ...}.

    What lm-eval's `loglikelihood_rolling` tasks report: exp(-log likelihood / words), words being what white space
    separates in the document, and the same by UTF-8 bytes. rolling: `rolling_windows` of the documents. length: tokens
    that the model sees at once.
    """
    windows, targets = rolling
    total = sum(float(loss.sum()) for loss in _losses(logits, windows, targets, batch_size, progress))
    words = sum(len(re.split(r"\s+", document)) for document in documents)
    size = sum(len(document.encode()) for document in documents)
    return {
        "word_ppl": _exp(total / words),
        "byte_ppl": _exp(total / size),
        "bits_per_byte": total / size / math.log(2),
        "documents": len(documents),
        "words": words,
        "bytes": size,
        "length": length,
    }


def rolling_windows(documents: list[str], tokenizer, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """lm-eval's windows of documents as inputs and targets (n, longest) int64, -100 where nothing is predicted.

    UsageError where the tokenizer has neither a token that begins texts nor one that ends them: lm-eval predicts the
    first token of a document from it.
    """
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if prefix is None:
        raise UsageError(
            f"{tokenizer.name_or_path}: the tokenizer has neither bos_token nor eos_token, and the protocol lm-eval "
            "predicts the first token of a document from one; set it in tokenizer_config.json, or use protocol gptq"
        )
    inputs, targets = [], []
    for document in documents:
        ids = known(tokenizer, tokenizer(document, verbose=False).input_ids)  # with its special tokens, as lm-eval does
        pieces = get_rolling_token_windows(ids, prefix_token=prefix, max_seq_len=length, context_len=1)
        for context, wanted in map(make_disjoint_window, pieces):
            seen = (context + wanted)[:-1]
            inputs.append(torch.tensor(seen))
            targets.append(torch.tensor([-100] * (len(seen) - len(wanted)) + wanted))
    # What is padded stands behind the text, where causal models do not see it.
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(inputs, True, prefix), pad(targets, True, -100)


def relative_change(nll: list[float], original: list[float]) -> dict:
    """Perplexity of a model against the original's on the same windows: {"change", "low", "high"} as fractions.

    A paired bootstrap over windows: what windows share, being easy or hard, does not blur the difference.
    ValueError where the windows are not the same.
    """
    if len(nll) != len(original):
        raise UsageError(f"{len(nll)} windows against {len(original)}: evaluate both by the same protocol")
    difference = np.array(nll) - np.array(original)
    interval = _interval(difference) or (math.nan, math.nan)
    return {"change": math.expm1(float(difference.mean())), "low": interval[0] - 1, "high": interval[1] - 1}


def _losses(logits, windows, targets, batch_size, progress):
    """Losses of the predicted tokens of each window, float64; targets (n, m) are predicted by the first m
    positions, -100 is not predicted."""
    done, width = 0, targets.shape[1]
    batch_size = batch_size or max(1, BATCH_TOKENS // windows.shape[1])
    for batch in logits(windows, batch_size):
        for row in batch:
            wanted = targets[done].to(row.device)
            loss = F.cross_entropy(row[:width].float(), wanted, reduction="none", ignore_index=-100).double()
            if not math.isfinite(float(loss.sum())):
                raise UsageError(
                    f"window {done}: the loss is {float(loss.sum())}; the checkpoint is broken or overflows"
                )
            done += 1
            yield loss.cpu()
        progress(done, len(windows))


def _interval(values: np.ndarray) -> tuple[float, float] | None:
    """exp of the percentile bootstrap interval of the mean."""
    from scipy.stats import bootstrap

    if len(values) < 2:
        return None
    found = bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, confidence_level=CONFIDENCE, method="percentile", rng=0
    ).confidence_interval
    return _exp(float(found.low)), _exp(float(found.high))


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
