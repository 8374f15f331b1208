"""Shares of right answers with their standard errors, of tasks."""

from math import sqrt

from .table import Table


def task_table(records: list[dict]) -> Table:
    """A row for each model that tasks were measured of: accuracy (of a task that has none, its main metric, which is
    named) and its standard error over documents, in per cent, and of the mean of all tasks (√(Σ se²) / n, as the
    documents of two tasks have nothing in common)."""
    measured = [record for record in records if tasks_in(record)]
    names = [name for name in dict.fromkeys(n for r in measured for n in tasks_in(r)) if _accurate(measured, name)]
    rows: list[list[str | float]] = []
    for record in measured:
        found = [tasks_in(record).get(name, {}) for name in names]
        rows.append([record["name"], *map(_cell, found), _mean(found)])
    limits = sorted({limit for r in measured if (limit := r["zero_shot"]["protocol"]["limit"])})
    note = f"; the first {', '.join(map(str, limits))} documents of each" if limits else ""
    heads = [_head(measured, name) for name in names]
    return Table(f"Accuracy in % \u00b1 standard error{note}", ["method", *heads, "mean"], rows)


def score(figures: dict) -> tuple[float, float | None] | None:
    """The main metric of a task's figures, and its standard error; None where it is no share of right answers."""
    name, _, chosen = figures.get("metric", "acc").partition(",")
    ending = f",{chosen}" if chosen else ""
    if name + ending not in figures:
        return None
    return figures[name + ending], figures.get(f"{name}_stderr{ending}")


def _head(records: list[dict], task: str) -> str:
    metric = next((found["metric"] for r in records if "metric" in (found := tasks_in(r).get(task, {}))), "acc")
    return task if metric == "acc" else f"{task} {metric.replace(',', ' ')}"


def tasks_in(record: dict) -> dict[str, dict]:
    """What was measured of a model, by task; nothing where no task was."""
    return record.get("zero_shot", {}).get("tasks", {})


def _accurate(records: list[dict], name: str) -> bool:
    return any(score(tasks_in(record).get(name, {})) for record in records)


def _cell(figures: dict) -> str:
    found = score(figures)
    return _said(*found) if found else "-"


def _mean(found: list[dict]) -> str:
    """Of all tasks; "-" where one was not measured."""
    scores = [one for figures in found if (one := score(figures))]
    if not found or len(scores) < len(found):
        return "-"
    errors = [error for _, error in scores if error is not None]
    error = sqrt(sum(e**2 for e in errors)) / len(found) if len(errors) == len(found) else None
    return _said(sum(value for value, _ in scores) / len(found), error)


def _said(accuracy: float, error: float | None) -> str:
    return f"{100 * accuracy:.1f}" + (f" \u00b1 {100 * error:.1f}" if error is not None else "")
