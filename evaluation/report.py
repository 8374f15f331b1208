"""One self-contained HTML page of a run: what was decided, what it cost, how long it took."""

import base64
import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import UsageError
from ..memory.files import read_json
from ..runtime.modeling_moesvd import MANIFEST
from ..runtime.parts import Layout, Part, layout_from
from ..runtime.routers import Sources
from .memory import KINDS, disk_bytes
from .plot import figure_bytes
from .record import RECORD, collect
from .table import Table, changes, table8

PROJECTIONS = ("gate", "up", "gate_up", "down")


@dataclass(frozen=True)
class Stage:
    """A checkpoint of a run, as the report needs it."""

    folder: Path
    manifest: dict
    layout: Layout
    run: dict  # seconds, peak memory, date; empty where the checkpoint travelled without
    shapes: dict[str, dict[str, tuple[int, int]]]  # of each experts module
    experts: dict[str, int]
    bits: int  # of an original weight

    @property
    def name(self) -> str:
        return self.manifest["name"]


def write_report(folder: Path, file: Path) -> None:
    """Writes the report of a run's output folder, or of one checkpoint, as HTML that needs no other file.

    ValueError where there is no checkpoint of ours.
    """
    import jinja2

    folders = [folder] if (folder / MANIFEST).is_file() else sorted(p.parent for p in folder.glob(f"*/{MANIFEST}"))
    stages = [_stage(path) for path in folders if "stages" in read_json(path / MANIFEST)]
    if not stages:
        raise UsageError(f"{folder}: no checkpoint of ours in it; give a run's --out, or a checkpoint")
    measured = [path for path in [folder, *folder.iterdir()] if (path / RECORD).is_file()] if folder.is_dir() else []
    records = collect(sorted(measured)) if measured else []
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    last = stages[-1]
    page = environment.get_template("report.html.jinja").render(
        last=last,
        stages=stages,
        account=last.manifest["accounting"],
        recipe=last.manifest["recipe"],
        measured=table8(records) if records else None,
        changes=changes(records),
        layers=_layer_table(last),
        weak=_weak(stages),
        figures=list(_figures(stages, records)),
        times=_times(stages),
        megabytes=lambda size: f"{size / 1e6:,.2f} MB",
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page)


def _stage(folder: Path) -> Stage:
    manifest = read_json(folder / MANIFEST)
    config = read_json(folder / "config.json")
    run = folder / "run.json"
    timed = read_json(run) if run.is_file() else {}
    return Stage(folder, manifest, layout_from(config["moesvd"]), timed, *_shapes(folder))


def _shapes(folder: Path) -> tuple[dict, dict, int]:
    """(out, in) of the projections of each experts module, gate and up as one as well; experts in each; bits of an
    original weight."""
    from ..checkpoint.accounting import original_model
    from ..model.experts import all_shapes, expert_count, find_experts
    from ..model.stream import StreamedModel

    parent = StreamedModel(folder)
    found = dict(find_experts(original_model(parent)))
    shapes = {path: all_shapes(experts) for path, experts in found.items()}
    return shapes, {p: expert_count(experts) for p, experts in found.items()}, 8 * parent.stored_dtype.itemsize


def expert_bits(
    parts: list[Part], shape: tuple[int, int], experts: int, bits: int, sources: Sources | None = None
) -> np.ndarray:
    """(experts,) stored bits per original weight of a projection; a shared bank is shared out among its users, and what
    stands for several original experts among these."""
    total = np.zeros(experts)
    sources = sources or [[expert] for expert in range(experts)]
    for part in parts:
        for bank in part.banks(*shape).values():
            stored = 8 * bank.form.bank_bytes(bank.shape[1:], _plain(bits))
            for expert, row in zip(part.experts, bank.rows):
                share = stored / bank.rows.count(row) / len(sources[expert])
                for original in sources[expert]:
                    total[original] += share
    return total / (shape[0] * shape[1])


def _plain(bits: int):
    import torch

    return {16: torch.bfloat16, 32: torch.float32}[bits]


def _layer_table(stage: Stage) -> Table:
    """What became of each layer: decomposed or kept, ranks, widths, bits per original weight, error, sensitivity."""
    rows: list[list[str | float]] = []
    for path, projections in stage.layout.experts.items():
        decision = stage.manifest["decisions"].get(path, {})
        for name in sorted(projections, key=PROJECTIONS.index):
            parts, shape = projections[name], stage.shapes[path][name]
            errors = _mean_error(stage.manifest["errors"].get(path, {}).get(name))
            bits = expert_bits(parts, shape, stage.experts[path], stage.bits, stage.layout.sources.get(path))
            rows.append([
                path.removesuffix(".experts"), name, _describe(parts),
                round(float(bits.mean()), 3),
                "-" if errors is None else float(f"{errors:.3g}"),
                float(f"{decision['sensitivity']:.3g}") if "sensitivity" in decision else "-",
            ])  # fmt: skip
    columns = ["layer", "matrix", "experts are", "bits/weight", "whitened error", "sensitivity"]
    return Table("", columns, rows)


def _describe(parts: list[Part]) -> str:
    said = []
    for part in parts:
        how = "/".join(sorted({str(form) for form in part.formats.values()})) or "16 bit"
        kind = f"rank {part.rank}" if part.rank else "dense"
        shared = [bank for bank in sorted(part.chain) if max(part.users(bank)) + 1 < len(part.experts)]
        note = f", {' and '.join(shared)} shared" if shared else ""
        said.append(f"{len(part.experts)} × {kind} in {how}{note}")
    return "; ".join(said) or "removed"


def _mean_error(errors) -> float | None:
    """Mean of the numbers in a report of errors, whatever its nesting."""
    found: list[float] = []
    todo = [errors]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            todo += value.values()
        elif isinstance(value, list):
            todo += value
        elif isinstance(value, int | float):
            found.append(float(value))
    return float(np.mean(found)) if found else None


def _weak(stages: list[Stage]) -> dict[str, dict[str, list[int]]]:
    """{module: {"few" | "none": experts that saw so many calibration tokens}}, of those that are to be named."""
    found: dict[str, dict[str, list[int]]] = {}
    for stage in stages:
        for path, decision in stage.manifest["decisions"].items():
            weak = decision.get("weak_experts", {})
            if any(weak.values()):
                found[path] = {word: experts for word, experts in weak.items() if experts}
    return found


def _times(stages: list[Stage]) -> list[list[str]]:
    return [
        [
            stage.name,
            f"{stage.run['seconds']:,.0f} s",
            f"{stage.run['anonymous_bytes']['peak'] / 1e9:.2f} GB",
            stage.run["finished"],
        ]
        for stage in stages
        if stage.run
    ]


def _figures(stages: list[Stage], records: list[dict]):
    """(title, note, data URI of an SVG) of every picture that there is something to show in."""
    if any(record["perplexity"] for record in records):
        draw = lambda: figure_bytes([r for r in records if r["perplexity"]])  # noqa: E731
        yield "Perplexity against bytes", "Lower left is better.", _svg(draw)
    last = stages[-1]
    yield (
        "What is left of every expert",
        "Stored bits per original weight: each row a layer, each column an expert. Dark is little; a row that stays at "
        f"{last.bits} bits was not decomposed (Figure 3 of the paper).",
        _svg(lambda: _draw_bits(last)),
    )
    yield "Memory by kind of tensor", "MB of tensors on disk, stage by stage.", _svg(lambda: _draw_memory(stages))
    if any(stage.manifest["errors"] for stage in stages):
        note = "Mean whitened error of the experts' matrices, relative to what they put out on the calibration inputs."
        yield "Error by layer", note, _svg(lambda: _draw_errors(stages))
    sensitive = {p: d["sensitivity"] for p, d in stages[0].manifest["decisions"].items() if "sensitivity" in d}
    if sensitive:
        chosen = [stages[0].manifest["decisions"][path].get("decomposed", True) for path in sensitive]
        note = "Sensitivity of each layer (eq. 4 of the paper); the decomposed ones are filled."
        yield "Layer sensitivity", note, _svg(lambda: _draw_sensitivity(list(sensitive.values()), chosen))
    for stage in stages:
        for file in sorted(stage.folder.glob("loss*.csv")):
            yield f"Healing of {stage.name}", "Loss over steps.", _svg(lambda file=file: _draw_loss(file))


def _svg(draw: Callable) -> str:
    """What `draw` returns, a figure, as a data URI."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(
        {"svg.hashsalt": "moesvd", "font.size": 12, "svg.fonttype": "none", "font.family": "sans-serif"}
    ):
        figure, text = draw(), io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None}, bbox_inches="tight")
        plt.close(figure)
    return "data:image/svg+xml;base64," + base64.b64encode(text.getvalue().encode()).decode()


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
    figure, axes = _axes(5.8, 3.2)
    for stage in stages:
        errors = [_mean_error(e) for path, e in stage.manifest["errors"].items() if "experts" in path]
        axes[0, 0].plot(range(len(errors)), [e or np.nan for e in errors], marker="o", label=stage.name)
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
