"""Claims, and whether they are met."""

from dataclasses import dataclass

from moesvd_quant.evaluation.table import Table


@dataclass(frozen=True)
class Bar:
    """A claim: `figure` is to be at most `limit`."""

    claim: str
    figure: float
    limit: float

    @property
    def met(self) -> bool:
        return self.figure <= self.limit


def verdict(bars: list[Bar]) -> Table:
    """A row for each claim."""
    rows: list[list[str | float]] = [
        [bar.claim, round(bar.figure, 3), round(bar.limit, 3), "met" if bar.met else "missed"] for bar in bars
    ]
    return Table("Bars: increase in log-perplexity relative to a baseline", ["claim", "figure", "at most", ""], rows)
