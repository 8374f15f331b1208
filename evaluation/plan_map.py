"""What plans leave of each layer's experts, side by side: a table and a picture (MoE-SVD's Figures 3, 5, 9 and 10)."""

from dataclasses import dataclass
from pathlib import Path

from .plot import save_figure
from .table import Table


@dataclass(frozen=True)
class Planned:
    """A plan by its name. left: share of the stored bits of its routed experts that each layer with experts keeps;
    accounting: exact bytes and parameters (`checkpoint.accounting`)."""

    name: str
    left: dict[int, float]
    accounting: dict


def planned(name: str, bits: dict[str, list[float]], original: int, accounting: dict) -> Planned:
    """bits: {path of a module: stored bits per original weight of each expert}; original: bits of a weight before."""
    left: dict[int, list[float]] = {}
    for path, each in bits.items():
        layer = next(int(part) for part in path.split(".") if part.isdigit())
        left.setdefault(layer, []).extend(value / original for value in each)
    return Planned(name, {layer: sum(each) / len(each) for layer, each in left.items()}, accounting)


def table_of(plans: list[Planned]) -> Table:
    """Bytes, shares removed, and the layers that lose anything."""
    rows: list[list[str | float]] = []
    for one in plans:
        account = one.accounting
        changed = [str(layer) for layer, left in one.left.items() if left < 1]
        rows.append([
            one.name,
            round(account["disk_bytes"] / 1e6, 2),
            round(100 * account["expert_ratio"], 1),
            round(100 * account["model_ratio"], 1),
            len(changed),
            "all" if len(changed) == len(one.left) else " ".join(changed),
        ])  # fmt: skip
    columns = ["plan", "disk MB", "experts removed %", "model removed %", "layers", "which"]
    return Table("Plans", columns, rows)


def plot_plans(plans: list[Planned], file: Path) -> None:
    """As PNG: a map of what is left, a row for each layer and a column for each plan; and memory over the plans."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    layers = sorted({layer for one in plans for layer in one.left})
    grid = np.array([[one.left.get(layer, np.nan) for one in plans] for layer in layers])
    wide = max(2.6, 0.75 * len(plans) + 1.6)
    figure, (left, right) = plt.subplots(1, 2, figsize=(2 * wide + 1, 1.6 + 0.2 * max(12, min(len(layers), 40))))
    shown = left.imshow(grid, aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest", origin="lower")
    every = max(1, len(layers) // 16)
    left.set_yticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]])
    left.set(ylabel="layer with experts", title="share of the experts' bits that is left")
    figure.colorbar(shown, ax=left)
    at = range(len(plans))
    resident = [one.accounting["resident_bytes"] / 1e9 for one in plans]
    before = plans[0].accounting["original_bytes"] / 1e9
    right.bar(at, resident, color="tab:blue", width=0.6)
    right.axhline(before, color="black", linestyle="--", linewidth=1)
    right.annotate(
        f"original {before:.3g}", (at[-1], before), ha="right", va="bottom", xytext=(0, 2), textcoords="offset points"
    )
    for x, value in zip(at, resident):
        right.annotate(f"{value:.3g}", (x, value), ha="center", va="bottom", fontsize=8)
    right.set(ylabel="GB in memory", title="memory of the weights", ylim=(0, 1.15 * max(before, *resident)))
    for axis in (left, right):
        axis.set_xticks(at, [one.name for one in plans], rotation=45, ha="right")
    figure.tight_layout()
    save_figure(figure, file)
