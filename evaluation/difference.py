"""How the predictions of a model differ from the original's: what perplexity cannot see."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import numpy as np
import torch

from ..errors import UsageError
from .perplexity import relative_change

PARTS = 4  # of a window, for the divergence by position


@dataclass(frozen=True)
class Difference:
    """Of the tokens that a text predicts. Divergences are Kullback-Leibler, of the model's next-token distribution from
    the original's, in nats per token; top1: share of tokens at which both find the same token likeliest.

    change: perplexity beside the original's as fractions, {"change", "low", "high"}, with a paired 95 % interval over
    windows. by_position: mean divergence in each quarter of the windows, the first one first.
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

    def to_dict(self) -> dict:
        return asdict(self)


@torch.no_grad()
def difference(
    original: Iterable[torch.Tensor],
    other: Iterable[torch.Tensor],
    windows: torch.Tensor,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Difference:
    """original, other: logits (batch, length, vocabulary) of the same windows (n, length), int64, batch by batch; both
    may have other batches. Where one model's vocabulary is padded, the tokens that both know are compared.

    UsageError names the first window where a logit is not finite.
    """
    divergences, same = [], []
    nlls: tuple[list[float], list[float]] = ([], [])
    for at, (p, q) in enumerate(zip(_rows(original), _rows(other))):
        known = min(p.shape[-1], q.shape[-1])
        p, q = (row[:-1, :known].float().log_softmax(-1).cpu() for row in (p, q))
        divergence = (p.exp() * (p - q)).sum(-1).double()
        if not torch.isfinite(divergence).all():
            raise UsageError(f"window {at}: logits are not finite; the checkpoint is broken or overflows")
        divergences.append(divergence.clamp(min=0))
        same.append(p.argmax(-1) == q.argmax(-1))
        for nll, row in zip(nlls, (p, q)):
            nll.append(-float(row.double().gather(1, windows[at, 1:, None]).mean()))
        progress(at + 1, len(windows))
    found = torch.stack(divergences)
    median, high99, high999 = np.quantile(found, (0.5, 0.99, 0.999), method="inverted_cdf").tolist()
    return Difference(
        found.numel(), float(found.mean()), median, high99, high999, float(found.max()),
        float(torch.stack(same).double().mean()), relative_change(nlls[1], nlls[0]),
        [float(part.mean()) for part in found.tensor_split(PARTS, dim=1) if part.numel()],
    )  # fmt: skip


def _rows(batches: Iterable[torch.Tensor]) -> Iterable[torch.Tensor]:
    return (row for batch in batches for row in batch)
