"""One self-contained HTML page of a run: what was decided, what it cost, how long it took."""

from pathlib import Path

from ..checkpoint.density import expert_bits
from ..errors import UsageError
from ..memory.files import read_json
from ..runtime.modeling_moesvd import MANIFEST
from ..runtime.parts import Part
from .changes import change_table, changes
from .page import write_page
from .paper_tables import table8
from .record import RECORD, collect
from .report_figures import figures
from .report_runs import runs_in, write_runs
from .report_stage import PROJECTIONS, Stage, mean_error, stage_of
from .table import Table
from .task_table import task_table


def write_report(folder: Path, file: Path) -> None:
    """Writes the report of a run's output folder, of one checkpoint, or of a folder of runs, as one HTML file.

    UsageError where there is no checkpoint of ours.
    """
    folders = [folder] if (folder / MANIFEST).is_file() else sorted(p.parent for p in folder.glob(f"*/{MANIFEST}"))
    stages = [stage_of(path) for path in folders if "stages" in read_json(path / MANIFEST)]
    if not stages and (runs := runs_in(folder)):
        write_runs(folder, runs, file)
        return
    if not stages:
        raise UsageError(f"{folder}: no checkpoint of ours; give a run's --out, a folder of those, or a checkpoint")
    measured = [path for path in [folder, *folder.iterdir()] if (path / RECORD).is_file()] if folder.is_dir() else []
    records = collect(sorted(measured)) if measured else []
    last = stages[-1]
    write_page(
        "report.html.jinja",
        file,
        last=last,
        stages=stages,
        account=last.manifest["accounting"],
        recipe=last.manifest["recipe"],
        recipe_name=last.manifest["recipe"].partition("\n")[0].removeprefix("# resolved recipe "),
        measured=table8(records) if records else None,
        changes=change_table(changes(records)),
        tasks=task_table(records),
        layers=_layer_table(last),
        weak=_weak(stages),
        figures=list(figures(stages, records)),
        times=_times(stages),
        megabytes=lambda size: f"{size / 1e6:,.2f} MB",
    )


def _layer_table(stage: Stage) -> Table:
    """What became of each layer: decomposed or kept, ranks, widths, bits per original weight, error, sensitivity."""
    rows: list[list[str | float]] = []
    for path, projections in stage.layout.experts.items():
        decision = stage.manifest["decisions"].get(path, {})
        for name in sorted(projections, key=PROJECTIONS.index):
            parts, shape = projections[name], stage.shapes[path][name]
            errors = mean_error(stage.manifest["errors"].get(path, {}).get(name))
            bits = expert_bits(parts, shape, stage.experts[path], stage.bits, stage.layout.sources.get(path))
            rows.append([
                path.removesuffix(".experts"), name,
                round(float(bits.mean()), 3),
                "-" if errors is None else float(f"{errors:.3g}"),
                float(f"{decision['sensitivity']:.3g}") if "sensitivity" in decision else "-",
                _describe(parts),
            ])  # fmt: skip
    columns = ["layer", "matrix", "bits/weight", "whitened error", "sensitivity", "experts are"]
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
            stage.run["finished"].replace("T", " ").removesuffix("Z") + " UTC",
        ]
        for stage in stages
        if stage.run
    ]
