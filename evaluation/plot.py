"""Perplexity against bytes, the picture every method is judged by; speed over batches and lengths."""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from .difference_columns import compared_texts, difference_of, texts_of


def family(name: str) -> str:
    """A method without its figures: gptq of gptq4, svd-gptq of svd40-gptq3, svd-gptq@ of svd-gptq@2bpw."""
    return re.sub(r"(?<=[a-z]{3})\d+", "", re.sub(r"@.*", "@", name))


def plot_bytes(records: list[dict], file: Path) -> None:
    """The figure of `figure_bytes` as PNG."""
    save_figure(figure_bytes(records), file)


def plot_divergence(records: list[dict], file: Path) -> None:
    """The figure of `figure_divergence` as PNG, where some record has a divergence."""
    if compared_texts(records):
        save_figure(figure_divergence(records), file)


def save_figure(figure, file: Path) -> None:
    """As PNG; folders are made."""
    import matplotlib.pyplot as plt

    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def figure_bytes(records: list[dict]):
    """A panel per text: perplexity against MB on disk, both logarithmic; a colour and a line per family."""
    return _against_bytes(
        records, texts_of(records), "perplexity", lambda r, text: r["perplexity"].get(text, {}).get("ppl")
    )


def figure_divergence(records: list[dict]):
    """The same of the divergence from the original, which has none itself; for records of which some has one."""
    named, texts = "divergence, nats per token", compared_texts(records)
    return _against_bytes(records, texts, named, lambda r, text: difference_of(r, text).get("mean"))


def _against_bytes(records: list[dict], texts: list[str], named: str, value: Callable[[dict, str], float | None]):
    """value(record, text): what is drawn; nothing where it is None."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    families = sorted(
        {family(r["name"]) for r in records}, key=lambda f: (f != "original", not f.startswith("gptq"), f)
    )
    columns = 2 if len(texts) == 4 else min(3, len(texts))
    rows = -(-len(texts) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, 3.8 * rows), squeeze=False)
    for axis, text in zip(axes.flat, texts):
        for index, kind in enumerate(families):
            points = sorted(
                (r["memory"]["disk_bytes"] / 1e6, found)
                for r in records
                if family(r["name"]) == kind and (found := value(r, text)) is not None
            )
            style = (
                dict(marker="*", markersize=13) if kind == "original" else dict(marker="o" if "svd" in kind else "s")
            )
            colour = plt.get_cmap("tab20")((2 * index) % 20 + (2 * index) // 20)
            if not points:
                continue
            axis.plot(*zip(*points), "--", color=colour, label=kind.replace("@", " at a budget"), alpha=0.9, **style)
        for axes_of, scale in ((axis.xaxis, axis.set_xscale), (axis.yaxis, axis.set_yscale)):
            scale("log")
            low, high = axes_of.get_data_interval()
            many = (1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
            axes_of.set_major_locator(LogLocator(subs=many if high < 10 * low else (1.0, 2.0, 5.0)))
            axes_of.set_major_formatter(ScalarFormatter())
            axes_of.set_minor_formatter(NullFormatter())
        axis.set_title(text)
        axis.set_xlabel("MB on disk")
        axis.set_ylabel(named)
        axis.grid(alpha=0.25)
    for axis in list(axes.flat)[len(texts) :]:
        axis.axis("off")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=min(5, len(labels)), frameon=False)
    figure.tight_layout(rect=(0, 0.04 + 0.025 * ((len(labels) - 1) // 5 + 1), 1, 1))
    return figure


def plot_experts(bits: dict[str, list[float]], file: Path) -> None:
    """Stored bits per original weight of every expert as PNG: a row for each module of experts, a column for each of
    them (the paper's Figure 3). bits: {path of the module: of each expert}."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    grid = np.full((len(bits), max(map(len, bits.values()))), np.nan)
    for row, values in zip(grid, bits.values()):
        row[: len(values)] = values
    figure, axis = plt.subplots(figsize=(6.4, 1.4 + 0.22 * max(4, min(len(grid), 40))))
    shown = axis.imshow(grid, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    axis.set(xlabel="expert", ylabel="layer with experts")
    figure.colorbar(shown, label="bits per original weight")
    figure.tight_layout()
    save_figure(figure, file)


def plot_speed(result: dict, file: Path) -> None:
    """The paper's Figure 4 as PNG: tokens per second over batch sizes (at the shortest prompt) and over lengths (at the
    largest batch), with the range over repeats; a row for prefill, one for decode."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = result["cells"]
    names = list(dict.fromkeys(cell["model"] for cell in cells))
    fixed = {"batch": min(cell["length"] for cell in cells), "length": max(cell["batch"] for cell in cells)}
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), squeeze=False)
    for row, phase in zip(axes, ("prefill", "decode")):
        for axis, (along, other) in zip(row, (("batch", "length"), ("length", "batch"))):
            for name in names:
                shown = [c for c in cells if c["model"] == name and c[other] == fixed[along]]
                rates = [c[phase]["tokens_per_second"] for c in shown]
                low = [r - c[phase]["min"] for r, c in zip(rates, shown)]
                high = [c[phase]["max"] - r for r, c in zip(rates, shown)]
                axis.errorbar([c[along] for c in shown], rates, [low, high], marker="o", capsize=3, label=name)
            axis.set(
                xscale="log", yscale="log", xlabel=along, ylabel="tokens/s", title=f"{phase}, {other} {fixed[along]}"
            )
            axis.grid(alpha=0.25)
    axes[0, 0].legend(frameon=False)
    figure.tight_layout()
    save_figure(figure, file)


def sweep_lines(swept: list[dict]) -> dict[str, list[dict]]:
    """Records of a sweep by what they are a line of: the method, and the recipe where several recipes are of that."""
    recipes = {(r["sweep"]["method"], r["sweep"]["recipe"]) for r in swept}
    alike = Counter(method for method, _ in recipes)
    lines: dict[str, list[dict]] = {}
    for record in swept:
        method, recipe = record["sweep"]["method"], record["sweep"]["recipe"]
        lines.setdefault(f"{method} ({recipe})" if alike[method] > 1 else method, []).append(record)
    return lines


def plot_sweep(records: list[dict], file: Path) -> None:
    """The paper's Figure 6 as PNG: perplexity over the number of calibration windows, a point for each seed and a line
    through their means for each recipe (the calibration text is one of its options); a panel per text."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    texts = texts_of(records)
    swept = sweep_lines([r for r in records if "sweep" in r])
    figure, axes = plt.subplots(1, len(texts), figsize=(5 * len(texts), 4), squeeze=False)
    for axis, text in zip(axes[0], texts):
        for label, members in swept.items():
            points: dict[int, list[float]] = {}
            for record in members:
                points.setdefault(record["sweep"]["samples"], []).append(record["perplexity"][text]["ppl"])
            sizes = sorted(points)
            (line,) = axis.plot(sizes, [sum(points[s]) / len(points[s]) for s in sizes], label=label)
            axis.scatter(
                [s for s in sizes for _ in points[s]], [v for s in sizes for v in points[s]], color=line.get_color()
            )
        axis.set(title=text, xlabel="calibration windows", ylabel="perplexity", xscale="log")
        axis.grid(alpha=0.25)
    axes[0, 0].legend(frameon=False)
    figure.tight_layout()
    save_figure(figure, file)


def plot_ranking(panels: dict[str, tuple[list[float], list[float]]], file: Path) -> None:
    """Forecast cost against true increase in log-perplexity as PNG, a point for each plan; panels: {title: both}."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from scipy.stats import spearmanr

    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4.4), squeeze=False)
    for axis, (title, (forecasts, increases)) in zip(axes[0], panels.items()):
        axis.scatter(forecasts, increases)
        ranked = spearmanr(forecasts, increases).statistic
        axis.set(title=f"{title}: rank correlation {ranked:.2f}", xlabel="forecast", ylabel="nats per token")
        axis.set(xscale="log", yscale="log")
        axis.grid(alpha=0.25, which="both")
    figure.tight_layout()
    save_figure(figure, file)
