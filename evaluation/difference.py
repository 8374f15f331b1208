"""How the predictions of a model differ from the original's: what perplexity cannot see."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass

import numpy as np
import torch

from ..errors import UsageError
from ..model.stream import PREDICTED
from .kinds import KINDS
from .perplexity import Logits, relative_change

PARTS = 4  # of a window, for the divergence by position


@dataclass(frozen=True)
class OfKind:
    """The same of the tokens of one kind (`kinds.KINDS`)."""

    tokens: int
    mean: float
    top1: float


@dataclass(frozen=True)
class Difference:
    """Of the tokens that a text predicts. Divergences are Kullback-Leibler, of the model's next-token distribution from
    the original's, in nats per token; top1: share of tokens at which both find the same token likeliest.

    change: perplexity beside the original's as fractions, {"change", "low", "high"}, with a paired 95 % interval over
    windows. by_position: mean divergence in each quarter of the windows, the first one first. by_kind: by the kind of
    the predicted token, those that the text has.
    """

    tokens: int
    mean: float
    median: float
    high99: float  # 99 % of the tokens have at most this
    high999: float  # 99.9 %
    largest: float
    top1: float
    change: dict[str, float]
    by_position: list[float]
    by_kind: dict[str, OfKind]

    def to_dict(self) -> dict:
        return asdict(self)


class Divergences:
    """Takes the predictions of the original and of a model window by window, and keeps a few numbers of each token."""

    def __init__(self, windows: torch.Tensor, kinds: torch.Tensor) -> None:
        """windows: (n, length) int64; kinds: (n, length - 1), of `kinds.kinds`."""
        self.windows, self.kinds = windows, kinds
        self.found: list[torch.Tensor] = []
        self.same: list[torch.Tensor] = []
        self.nlls: tuple[list[float], list[float]] = ([], [])

    @torch.no_grad()
    def add(self, original: torch.Tensor, other: torch.Tensor) -> None:
        """Logits (length, vocabulary) of the next window. Where one vocabulary is padded, the tokens that both know are
        compared. UsageError names the window where a logit is not finite."""
        at, known = len(self.found), min(original.shape[-1], other.shape[-1])
        targets = self.windows[at, 1:, None]
        pieces = max(1, PREDICTED // known)  # tokens at a time: logarithms of a whole window may be gigabytes
        parts = zip(original[:-1].split(pieces), other[:-1].split(pieces), targets.split(pieces))
        done = [_tokens(a[:, :known], b[:, :known], wanted) for a, b, wanted in parts]
        divergence, same, nll, other_nll = (torch.cat(column) for column in zip(*done))
        if not torch.isfinite(divergence).all():
            raise UsageError(f"window {at}: logits are not finite; the checkpoint is broken or overflows")
        self.found.append(divergence.clamp(min=0))
        self.same.append(same)
        for kept, value in zip(self.nlls, (nll, other_nll)):
            kept.append(float(value.mean()))

    def result(self) -> Difference:
        found, same = torch.stack(self.found), torch.stack(self.same).double()
        median, high99, high999 = np.quantile(found, (0.5, 0.99, 0.999), method="inverted_cdf").tolist()
        of = {kind: self.kinds == place for place, kind in enumerate(KINDS)}
        return Difference(
            found.numel(), float(found.mean()), median, high99, high999, float(found.max()), float(same.mean()),
            relative_change(self.nlls[1], self.nlls[0]),
            [float(part.mean()) for part in found.tensor_split(PARTS, dim=1) if part.numel()],
            {
                kind: OfKind(int(here.sum()), float(found[here].mean()), float(same[here].mean()))
                for kind, here in of.items()
                if here.any()
            },
        )  # fmt: skip


def _tokens(original: torch.Tensor, other: torch.Tensor, targets: torch.Tensor):
    """Of each token (m): divergence, whether the likeliest is the same, losses of both; float64 but for the second."""
    p, q = (logits.float().log_softmax(-1).cpu() for logits in (original, other))
    losses = (-logs.gather(1, targets)[:, 0].double() for logs in (p, q))
    return (p.exp() * (p - q)).sum(-1).double(), p.argmax(-1) == q.argmax(-1), *losses


def difference(
    original: Iterable[torch.Tensor],
    other: Iterable[torch.Tensor],
    windows: torch.Tensor,
    kinds: torch.Tensor,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Difference:
    """original, other: logits (batch, length, vocabulary) of the same windows (n, length), int64, batch by batch; both
    may have other batches. kinds, and the rest: see `Divergences`. UsageError where windows have no logits."""
    found = Divergences(windows, kinds)
    for at, (p, q) in enumerate(zip(_rows(original), _rows(other))):
        found.add(p, q)
        progress(at + 1, len(windows))
    if len(found.found) < len(windows):
        raise UsageError(f"there are predictions of {len(found.found)} of {len(windows)} windows")
    return found.result()


def beside(logits: Logits, original: Iterable[torch.Tensor], found: Divergences) -> Logits:
    """The logits of a model, each compared with the original's on its way to whoever asks for them, once."""
    rows = iter(_rows(original))

    def compared(windows: torch.Tensor, batch_size: int) -> Iterator[torch.Tensor]:
        for batch in logits(windows, batch_size):
            for row in batch:
                found.add(next(rows), row)
            yield batch

    return compared


def _rows(batches: Iterable[torch.Tensor]) -> Iterable[torch.Tensor]:
    return (row for batch in batches for row in batch)
