"""The verb plan."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from shutil import get_terminal_size
from textwrap import fill
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import Device, Executor, Json, Memory, Model, Out, Overrides, Recipe, Workers, app, progress_bars

if TYPE_CHECKING:
    from ..api import Plan, StagePlan
    from ..evaluation.table import Table


@app.command()
def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    model: Model = None,
    out: Out = Path("out"),
    device: Device = "auto",
    memory: Memory = None,
    workers: Workers = 1,
    executor: Executor = "processes",
    plot: Annotated[Path | None, typer.Option(help="Also draw the map of experts into this PNG.")] = None,
    as_json: Json = False,
) -> None:
    """Forecast the bytes of every stage, exactly, memory, disk and time; show what goes where. Changes no weight."""
    how: Any = {"device": device, "memory": memory, "workers": workers, "executor": executor}
    with progress_bars(as_json) as report:
        from ..api import plan as make_plan

        made = make_plan(model, recipe, out, overrides or (), report=report, **how)
    if as_json:
        needs = {"needs": made.needs.to_dict(), "seconds": asdict(made.seconds)}
        print(json.dumps([asdict(one) | needs for one in made.stages]))
    else:
        _show(made)
    if plot:
        from ..evaluation.plot import plot_experts

        plot_experts(made.stages[-1].expert_bits, plot)
        print(f"plot: {plot}", file=sys.stderr)


def _show(made: "Plan") -> None:
    """A table of the stages, a map of what the last one leaves of each expert, and what is to be known beside."""
    from ..evaluation.expert_map import expert_map
    from ..evaluation.table import render

    last = made.stages[-1]
    print(render(_table(made)), end="")
    print(f"What {last.stage} leaves of the experts:")
    print("\n".join(expert_map(last.expert_bits)))
    for line in (*_kept(last), *_weak(made), made.needs.describe(), made.seconds.describe()):
        print(fill(line, get_terminal_size().columns, subsequent_indent="  ", break_on_hyphens=False))


def _table(made: "Plan") -> "Table":
    from ..evaluation.table import Table

    original = made.stages[0].accounting["original_bytes"]
    rows: list[list[str | float]] = [["original", round(original / 1e6, 2), 100.0, "", "", ""]]
    for one in made.stages:
        account = one.accounting
        rows.append([
            one.stage,
            round(account["disk_bytes"] / 1e6, 2),
            round(100 * account["disk_bytes"] / original, 1),
            round(account["bits_per_expert_weight"], 3),
            round(100 * account["expert_ratio"], 1),
            round(100 * account["model_ratio"], 1),
        ])  # fmt: skip
    columns = ["stage", "disk MB", "of original %", "bits per expert weight", "experts removed %", "model removed %"]
    return Table("Plan", columns, rows)


def _kept(last: "StagePlan") -> list[str]:
    """What stays in 16 bit, by its reason."""
    reasons: dict[str, list[str]] = {}
    for name, why in last.notes.get("kept in 16 bit", {}).items():
        reasons.setdefault(why, []).append(name)
    return [f"in 16 bit, {why}: {_named(names)}" for why, names in reasons.items()]


def _weak(made: "Plan") -> list[str]:
    """Experts that saw few calibration tokens: what is decided of them rests on little."""
    found = {
        f"{path} {expert}"
        for one in made.stages
        for path, decision in one.decisions.items()
        for experts in decision.get("weak_experts", {}).values()
        for expert in experts
    }
    return [f"saw few calibration tokens: {_named(sorted(found))}; more calibration.samples help"] if found else []


def _named(names: list[str]) -> str:
    """The first of them, and how many more there are."""
    shown = names[:2]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")
