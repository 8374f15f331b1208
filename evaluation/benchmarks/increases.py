"""How much perplexities rise, and what of it is chance."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev

SEEDS = (1, 2)  # of the calibration, besides 0
EQUAL = 0.002  # nats per token below which a difference says nothing, whatever the seeds say


class Increases:
    """Increase in log-perplexity over the original, in nats per token, by run and text."""

    def __init__(
        self, records: dict[str, dict], seen: Sequence[str], unseen: Sequence[str], repeated: Sequence[str] = ()
    ):
        """repeated: names of runs that are there with other calibration seeds too."""
        self.seen, self.unseen, self.repeated = list(seen), list(unseen), list(repeated)
        nll = {name: {text: found["nll"] for text, found in r["perplexity"].items()} for name, r in records.items()}
        self._nll, self._original = nll, nll["original"]

    def on(self, name: str, texts: Sequence[str]) -> float:
        """The mean over some texts."""
        return fmean(self._nll[name][text] - self._original[text] for text in texts)

    def spread(self, texts: Sequence[str], repeated: Sequence[str] | None = None) -> float:
        """The largest standard deviation over calibration seeds among the runs that were repeated, or some of them."""
        names = self.repeated if repeated is None else repeated
        runs = ([name, *(f"{name}~{seed}" for seed in SEEDS)] for name in names)
        return max(stdev(self.on(run, texts) for run in again) for again in runs)

    def over(self, name: str, base: str, texts: Sequence[str]) -> float:
        """Quotient of the increases of two runs; differences that count as equal give at most 1."""
        mine, other = self.on(name, texts), self.on(base, texts)
        equal = abs(mine - other) <= max(EQUAL, 2 * self.spread(texts))
        quotient = mine / other if other > 0 else math.inf
        return min(1.0, quotient) if equal else quotient
