"""Tables as the papers print them that need several models side by side, or a test of differences."""

import re

from ..errors import UsageError
from ..recipe.tasks import SEVEN
from .difference_columns import compared_texts, difference_cells, difference_heads, texts_of
from .perplexity import relative_change
from .table import Table
from .task_table import task_table, tasks_in

COLUMNS = ("GPTQ (4bit)", "GPTQ (3bit)", "MoE-SVD (4bit)", "MoE-SVD (3bit)")


def table8_as_printed(records: list[dict]) -> Table:
    """MoE-SVD's Table 8: a block of rows for each model, memory when loaded, perplexity on each text and, where it was
    measured, the difference from the original; a column for each method. UsageError where two records of a model are of
    one column, or none is of any."""
    texts = texts_of(records)
    models: dict[str, dict[str, dict]] = {}
    for record in records:
        column = column_of(record["name"])
        if column is None:
            continue
        model = model_of(record)
        found = models.setdefault(model, {})
        if column in found:
            names = f"{found[column]['name']} and {record['name']}"
            raise UsageError(f"{model}: {names} are both {column} of Table 8; give one of them")
        found[column] = record
    if not models:
        raise UsageError("no record is of a column of Table 8: recipes gptq4, gptq3, moe-svd-paper-gptq4, -gptq3")
    rows: list[list[str | float]] = []
    for model, found in models.items():
        rows.append([model, *COLUMNS])
        rows.append(["Memory (GB)", *[_cell(found.get(c), _gigabytes) for c in COLUMNS]])
        for text in texts:
            rows.append([f"Perplexity, {text}", *[_cell(found.get(c), _perplexity(text)) for c in COLUMNS]])
        for text in compared_texts(list(found.values())):
            cells = [difference_cells(found[c], [text]) if c in found else ["-", "-"] for c in COLUMNS]
            rows += [[head, *values] for head, *values in zip(difference_heads([text]), *cells)]
    left = len(records) - sum(map(len, models.values()))
    note = f"; {left} records of other methods are in table 8" if left else ""
    return Table(f"MoE-SVD's Table 8: memory when loaded, perplexity{note}", ["", *["" for _ in COLUMNS]], rows)


def column_of(name: str) -> str | None:
    """The column of Table 8 that a record's name belongs to."""
    bits = re.search(r"gptq([34])$", name)
    kind = "MoE-SVD" if name.startswith("moe-svd-paper") else "GPTQ" if name.startswith("gptq") else None
    return f"{kind} ({bits[1]}bit)" if bits and kind else None


def _gigabytes(record: dict) -> float:
    return record["memory"]["resident_bytes"] / 1e9


def _perplexity(text: str):
    return lambda record: record["perplexity"].get(text, {}).get("ppl")


def _cell(record: dict | None, figure) -> str | float:
    value = None if record is None else figure(record)
    return "-" if value is None else float(f"{value:.4g}")


def table12_paired(records: list[dict]) -> Table:
    """What Table 12 asks: is a difference to the original more than luck? A row for each record that has an original.

    Texts: change of perplexity with its 95 % interval by a paired bootstrap over windows. Tasks: difference of
    accuracy, and p of McNemar's exact test on the documents that one of both answers and the other does not. Then the
    divergence of predictions, which needs no test: it is zero for the original alone.
    """
    originals = {model_of(record): record for record in records if record["name"] == "original"}
    texts = texts_of(records)
    tasks = [task for task in SEVEN if any(task in tasks_in(r) for r in records)]
    compared = compared_texts(records)
    rows: list[list[str | float]] = []
    for record in records:
        original = originals.get(model_of(record))
        if original is None or original is record:
            continue
        changes = [_change(record["perplexity"].get(t, {}), original["perplexity"].get(t, {})) for t in texts]
        tests = [_test(tasks_in(record).get(t, {}), tasks_in(original).get(t, {})) for t in tasks]
        rows.append([model_of(record), record["name"], *changes, *tests, *difference_cells(record, compared)])
    if not rows:
        raise UsageError("no record has the original of its model beside it; evaluate that as well")
    title = "Differences to the original: perplexity with 95 % interval (paired bootstrap), accuracy with p (McNemar)"
    heads = [*texts, *[SEVEN[task] for task in tasks], *difference_heads(compared)]
    return Table(title, ["model", "method", *heads], rows)


def model_of(record: dict) -> str:
    """The model that a record's checkpoint was made of. UsageError where an early record does not say it."""
    if "base_model" not in record:
        raise UsageError(f"{record['name']}: its record does not name its model; delete it and evaluate again")
    return record["base_model"]


def _change(own: dict, base: dict) -> str:
    if "window_nll" not in own or "window_nll" not in base:
        return "-"
    found = relative_change(own["window_nll"], base["window_nll"])
    return f"{found['change']:+.2%} ({found['low']:+.2%} to {found['high']:+.2%})"


def _test(own: dict, base: dict) -> str:
    if "correct" not in own or "correct" not in base:
        return "-"
    return f"{own['acc'] - base['acc']:+.4f} (p {mcnemar(own['correct'], base['correct']):.2g})"


def mcnemar(own: str, base: str) -> float:
    """p of McNemar's exact two-sided test; own, base: a digit for each document, 1 where it was answered correctly.

    UsageError where they are not of the same documents.
    """
    from scipy.stats import binomtest

    if len(own) != len(base):
        raise UsageError(f"{len(own)} documents against {len(base)}: evaluate both with the same --limit")
    gained = sum(a > b for a, b in zip(own, base))
    lost = sum(a < b for a, b in zip(own, base))
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


PRINTED = {"8-printed": table8_as_printed, "12-paired": table12_paired, "tasks": task_table}
