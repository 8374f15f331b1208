"""The pictures of a run's report."""

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..checkpoint.density import expert_bits
from ..memory.files import read_json
from .difference_columns import compared_texts, texts_of
from .memory import KINDS, disk_bytes
from .page import Picture, svg
from .plot import figure_bytes, figure_divergence
from .report_stage import PROJECTIONS, Stage, mean_error

DIVERGENCE = (
    "How far predictions are from the original's (Kullback-Leibler divergence, mean over tokens). Lower left is better."
)


def figures(stages: list[Stage], records: list[dict]) -> Iterator[Picture]:
    """Every picture that there is something to show in."""
    if drawn := [record for record in records if record["perplexity"]]:
        source = svg(lambda: figure_bytes(drawn))
        yield Picture("Perplexity against bytes", "Lower left is better.", source, len(texts_of(drawn)))
    if compared := compared_texts(records):
        source = svg(lambda: figure_divergence(records))
        yield Picture("Divergence against bytes", DIVERGENCE, source, len(compared))
    last = stages[-1]
    yield Picture(
        "What is left of every expert",
        "Stored bits per original weight: each row a layer, each column an expert. Dark is little; a row that stays at "
        f"{last.bits} bits was not decomposed (Figure 3 of the paper).",
        svg(lambda: _draw_bits(last)),
    )
    note = "MB of tensors on disk, stage by stage."
    yield Picture("Memory by kind of tensor", note, svg(lambda: _draw_memory(stages)))
    if any(stage.manifest["errors"] for stage in stages):
        note = "Mean whitened error of the experts' matrices, relative to what they put out on the calibration inputs."
        yield Picture("Error by layer", note, svg(lambda: _draw_errors(stages)))
    sensitive = {p: d["sensitivity"] for p, d in stages[0].manifest["decisions"].items() if "sensitivity" in d}
    if sensitive:
        chosen = [stages[0].manifest["decisions"][path].get("decomposed", True) for path in sensitive]
        note = "Sensitivity of each layer (eq. 4 of the paper); the decomposed ones are filled."
        yield Picture("Layer sensitivity", note, svg(lambda: _draw_sensitivity(list(sensitive.values()), chosen)))
    timed = {stage.name: read_json(file) for stage in stages if (file := stage.folder / "run.json").is_file()}
    if any(len(one.get("layer_seconds", ())) > 1 for one in timed.values()):
        note = "Of reading the calibration text, where it was not known already, and of each stage, summed over layers."
        yield Picture("Seconds over layers", note, svg(lambda: draw_seconds(timed)))
    for stage in stages:
        for file in sorted(stage.folder.glob("loss*.csv")):
            yield Picture(f"Healing of {stage.name}", "Loss over steps.", svg(lambda file=file: _draw_loss(file)))


def draw_seconds(timed: dict[str, dict]):
    """Figure of the seconds of the walk and of each stage, from their run.json, over the number of layers (D.4 of the
    paper)."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _axes(6.4, 3.2)
    axis = axes[0, 0]
    lines = [("collection", one.get("walk_layer_seconds", [])) for one in timed.values()]
    lines += [(name, one.get("layer_seconds", [])) for name, one in timed.items()]
    for name, seconds in lines:
        if seconds:
            axis.plot(range(1, len(seconds) + 1), np.cumsum(seconds), "o-", markersize=3, label=name)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set(xlabel="layers", ylabel="seconds", ylim=(0, None))
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    figure.tight_layout()
    return figure


def _axes(width: float, height: float, columns: int = 1):
    import matplotlib.pyplot as plt

    return plt.subplots(1, columns, figsize=(width, height), squeeze=False)


def _draw_bits(stage: Stage):
    """Of the routed experts; shared ones, one in a layer, stand in the table."""
    from matplotlib.ticker import MaxNLocator

    layers = {path: parts for path, parts in stage.layout.experts.items() if stage.experts[path] > 1}
    names = [name for name in PROJECTIONS if all(name in parts for parts in layers.values())]
    figure, axes = _axes(6.4, 1.4 + 0.22 * max(4, min(len(layers), 40)), len(names))
    widest = max(stage.experts[path] for path in layers)
    grids = [np.full((len(layers), widest), np.nan) for _ in names]
    for name, grid in zip(names, grids):
        for row, (path, parts) in zip(grid, layers.items()):
            count = stage.experts[path]
            sources = stage.layout.sources.get(path)
            row[:count] = expert_bits(parts[name], stage.shapes[path][name], count, stage.bits, sources)
    for axis, name, grid in zip(axes[0], names, grids):
        top = max(map(np.nanmax, grids))
        shown = axis.imshow(grid, aspect="auto", cmap="viridis", vmin=0, vmax=top, interpolation="nearest")
        axis.set(title=name, xlabel="expert")
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
        axis.label_outer()
    axes[0, 0].set_ylabel("layer with experts")
    figure.colorbar(shown, ax=list(axes[0]), label="bits per original weight")
    return figure


def _draw_memory(stages: list[Stage]):
    figure, axes = _axes(5.8, 1.2 + 0.5 * len(stages))
    sizes = [disk_bytes(stage.folder) for stage in stages]
    left = np.zeros(len(stages))
    for kind in KINDS:
        widths = np.array([size[kind] / 1e6 for size in sizes])
        axes[0, 0].barh([stage.name for stage in stages], widths, left=left, label=kind)
        left += widths
    axes[0, 0].set_xlabel("MB")
    axes[0, 0].invert_yaxis()
    axes[0, 0].legend(ncols=3, loc="lower left", bbox_to_anchor=(-0.2, 1), frameon=False)
    return figure


def _draw_errors(stages: list[Stage]):
    from matplotlib.ticker import MaxNLocator

    figure, axes = _axes(5.8, 3.2)
    for stage in stages:
        errors = [mean_error(e) for path, e in stage.manifest["errors"].items() if "experts" in path]
        axes[0, 0].plot(range(len(errors)), [e or np.nan for e in errors], marker="o", label=stage.name)
    axes[0, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0, 0].set(xlabel="layer with experts", ylabel="whitened error")
    axes[0, 0].set_ylim(bottom=0)
    axes[0, 0].grid(alpha=0.25)
    axes[0, 0].legend(frameon=False)
    return figure


def _draw_sensitivity(values: list[float], chosen: list[bool]):
    figure, axes = _axes(5.8, 2.8)
    bars = axes[0, 0].bar(range(len(values)), values, edgecolor="tab:blue")
    for bar, decomposed in zip(bars, chosen):
        bar.set_facecolor("tab:blue" if decomposed else "white")
    axes[0, 0].set(xlabel="layer with experts", ylabel="sensitivity")
    return figure


def _draw_loss(file: Path):
    figure, axes = _axes(5.8, 3)
    rows = list(csv.DictReader(file.read_text().splitlines()))
    for column in ("loss", "validation_perplexity"):
        points = [(float(row["step"]), float(row[column])) for row in rows if row.get(column)]
        if points:
            axes[0, 0].plot(*zip(*points), marker="." if column == "loss" else "o", label=column.replace("_", " "))
    axes[0, 0].set(xlabel="step", yscale="log")
    axes[0, 0].grid(alpha=0.25)
    axes[0, 0].legend(frameon=False)
    return figure
