"""The table, plot and verdicts of `make bench-peers`."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import exp, log
from pathlib import Path

from moesvd_quant.evaluation.table import Table

OURS = ("gptq", "trellis", "fit")


@dataclass(frozen=True)
class OnText:
    """Of what is predicted in a text. divergence: mean, from the original, in nats per token; top1: share of tokens at
    which both find the same token likeliest."""

    perplexity: float
    divergence: float
    top1: float


@dataclass(frozen=True)
class Measured:
    """One result of one engine. bytes: all weight files; bits: stored per original weight of routed experts."""

    name: str
    family: str
    bytes: int
    bits: float
    texts: dict[str, OnText]

    @classmethod
    def from_dict(cls, content: dict) -> "Measured":
        """Of what `asdict` gives."""
        return cls(**content | {"texts": {text: OnText(**one) for text, one in content["texts"].items()}})


def table(found: Sequence[Measured]) -> Table:
    """Largest first. Divergences in thousandths of a nat per token."""
    texts = list(found[0].texts)
    kinds = ("perplexity", "KL", "same top token %")
    columns = [
        "engine",
        "result",
        "disk MB",
        "bits/expert weight",
        *(f"{text}: {kind}" for text in texts for kind in kinds),
    ]
    rows: list[list[str | float]] = []
    for one in sorted(found, key=lambda m: -m.bytes):
        row: list[str | float] = [one.family, one.name, round(one.bytes / 1e6, 3), round(one.bits, 3)]
        for text in texts:
            on = one.texts[text]
            row += [
                round(on.perplexity, 2),
                float(f"{1000 * on.divergence:.3g}"),
                round(100 * on.top1, 1),
            ]
        rows.append(row)
    return Table("", columns, rows)


def at_bytes(line: Sequence[tuple[int, float]], size: int) -> float | None:
    """The value of a line at `size` bytes, between its points (bytes, value) straight in the logarithms of both; None
    outside of them."""
    points = sorted(line)
    for (low, first), (high, last) in pairwise(points):
        if low <= size <= high:
            share = (log(size) - log(low)) / (log(high) - log(low)) if high > low else 0.0
            return exp((1 - share) * log(first) + share * log(last))
    return None


def verdicts(found: Sequence[Measured], mine: str = "fit") -> Table:
    """For each result of another family and each text, the divergence of `mine` at its bytes as a share of its own:
    above 1 the other one is better. Sizes outside of `mine` are left out."""
    texts = list(found[0].texts)
    rows: list[list[str | float]] = []
    lines = {text: [(m.bytes, m.texts[text].divergence) for m in found if m.family == mine] for text in texts}
    for other in sorted(found, key=lambda m: -m.bytes):
        own = {text: at_bytes(lines[text], other.bytes) for text in texts}
        if other.family == mine or None in own.values():
            continue
        shares = {text: (own[text] or 0.0) / other.texts[text].divergence for text in texts}
        better = [text for text, share in shares.items() if share > 1]
        said = f"{other.name} is better on {', '.join(better)}" if better else f"{mine} is better"
        rows.append([other.name, round(other.bytes / 1e6, 3), *(round(share, 2) for share in shares.values()), said])
    return Table(f"Divergence of {mine} in the same bytes, as a share", ["result", "disk MB", *texts, "verdict"], rows)


def plot(found: Sequence[Measured], file: Path) -> None:
    """Mean KL over bytes on disk as PNG, both logarithmic; a panel for each text, a line for each engine."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    texts, families = list(found[0].texts), list(dict.fromkeys(m.family for m in found))
    figure, axes = plt.subplots(1, len(texts), figsize=(3.6 * len(texts), 4.0), squeeze=False, sharey=True)
    for axis, text in zip(axes[0], texts):
        for index, family in enumerate(families):
            points = sorted((m.bytes / 1e6, m.texts[text].divergence) for m in found if m.family == family)
            marker, width = ("o", 2.2) if family in OURS else ("s", 1.0)
            axis.plot(*zip(*points), f"{marker}-", label=family, linewidth=width, markersize=4, color=f"C{index}")
        axis.set(xscale="log", yscale="log", title=text, xlabel="MB on disk")
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0)))
        axis.grid(alpha=0.25, which="both")
    axes[0, 0].set_ylabel("mean KL, nats per token")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    across = 5 if len(texts) > 1 else 2
    figure.legend(handles, labels, loc="lower center", ncol=across, frameon=False)
    figure.tight_layout(rect=(0, 0.04 + 0.045 * -(-len(labels) // across), 1, 1))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
    plt.close(figure)
