"""Zero-shot accuracies with their standard errors."""

from math import sqrt

from .table import Table


def task_table(records: list[dict]) -> Table:
    """A row for each model that tasks were measured of: accuracy and its standard error over documents, in per cent,
    and of the mean of all tasks (√(Σ se²) / n, as the documents of two tasks have nothing in common)."""
    measured = [record for record in records if tasks_in(record)]
    names = [name for name in dict.fromkeys(n for r in measured for n in tasks_in(r)) if _accurate(measured, name)]
    rows: list[list[str | float]] = []
    for record in measured:
        found = [tasks_in(record).get(name, {}) for name in names]
        rows.append([record["name"], *map(_cell, found), _mean(found)])
    limits = sorted({limit for r in measured if (limit := r["zero_shot"]["protocol"]["limit"])})
    note = f"; the first {', '.join(map(str, limits))} documents of each" if limits else ""
    return Table(f"Zero-shot accuracy in % \u00b1 standard error{note}", ["method", *names, "mean"], rows)


def tasks_in(record: dict) -> dict[str, dict]:
    """What was measured of a model, by task; nothing where no task was."""
    return record.get("zero_shot", {}).get("tasks", {})


def _accurate(records: list[dict], name: str) -> bool:
    return any("acc" in tasks_in(record).get(name, {}) for record in records)


def _cell(figures: dict) -> str:
    return _said(figures["acc"], figures.get("acc_stderr")) if "acc" in figures else "-"


def _mean(found: list[dict]) -> str:
    """Of all tasks; "-" where one was not measured."""
    if not found or any("acc" not in one for one in found):
        return "-"
    errors = [one["acc_stderr"] for one in found if "acc_stderr" in one]
    error = sqrt(sum(e**2 for e in errors)) / len(found) if len(errors) == len(found) else None
    return _said(sum(one["acc"] for one in found) / len(found), error)


def _said(accuracy: float, error: float | None) -> str:
    return f"{100 * accuracy:.1f}" + (f" \u00b1 {100 * error:.1f}" if error is not None else "")
