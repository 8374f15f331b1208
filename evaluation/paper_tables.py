"""Tables of records in the layouts of the paper: 2 (all measures), 8 (memory and perplexity), 11 (size and speed),
12 (over seeds). Further ones are in `published.py`."""

from collections import Counter
from statistics import fmean, stdev

from ..recipe.tasks import SEVEN
from .difference_columns import (
    compared_texts,
    difference_cells,
    difference_heads,
    difference_means,
    same_tokens,
    texts_of,
)
from .table import Table
from .task_table import score, tasks_in


def table8(records: list[dict]) -> Table:
    """Methods as rows, largest first, those of each model together: bytes on disk, after load and at the peak
    (where measured), bits per original expert weight, what was removed, perplexity on each text by the protocols that
    were asked for, and how predictions differ from the original's (`difference_columns`)."""
    texts = list(dict.fromkeys(text for r in records for text, one in r["perplexity"].items() if "ppl" in one))
    compared, words = compared_texts(records), _by_word(records)
    lengths = sorted({r["protocol"]["length"] for r in records})
    models = len({record.get("base_model") for record in records}) > 1
    peaks = any("peak_rss_bytes" in r["memory"] for r in records)
    rows: list[list[str | float]] = []
    for record in sorted(_by_size(records), key=lambda r: r.get("base_model", "")):
        memory, account = record["memory"], record["accounting"]
        figures = [record["perplexity"].get(text, {}).get("ppl") for text in texts]
        rows.append([
            *([record.get("base_model", "-")] if models else []),
            record["name"],
            _megabytes(memory["disk_bytes"]),
            _megabytes(memory["resident_bytes"]),
            *([_megabytes(_peak(memory))] if peaks else []),
            round(account["bits_per_expert_weight"], 3),
            round(100 * account["expert_ratio"], 1),
            round(100 * account["model_ratio"], 1),
            *["-" if value is None else float(f"{value:.5g}") for value in figures],
            *_word_figures(record, words),
            *difference_cells(record, compared),
        ])  # fmt: skip
    columns = [
        *(["model"] if models else []), "method", "disk MB", "loaded MB", *(["peak MB"] if peaks else []),
        "bits per expert weight", "experts removed %", "model removed %", *texts,
        *[f"{text}, per word" for text in words], *difference_heads(compared),
    ]  # fmt: skip
    windows = ", ".join(map(str, lengths))
    note = "; divergence from the original in nats per token" if compared else ""
    return Table(f"Memory and perplexity (windows of {windows} tokens){note}", columns, rows)


def _by_word(records: list[dict]) -> list[str]:
    """Texts that some record has the perplexity of by words, of lm-eval's protocol."""
    return list(dict.fromkeys(t for r in records for t, one in r["perplexity"].items() if "lm_eval" in one))


def _word_figures(record: dict, texts: list[str]) -> list[str | float]:
    return [_figure(record["perplexity"].get(text, {}).get("lm_eval", {}).get("word_ppl")) for text in texts]


def table2(records: list[dict]) -> Table:
    """The paper's Table 2: what was removed, tokens per second, perplexities, the seven tasks and their mean; then
    other tasks, and differences from the original."""
    texts = texts_of(records)
    compared = compared_texts(records)
    words = _by_word(records)
    more = [t for t in dict.fromkeys(t for r in records for t in tasks_in(r)) if t not in SEVEN]
    rows: list[list[str | float]] = []
    originals = {r.get("base_model"): r for r in records if r["name"] == "original"}
    for record in _by_size(records):
        figures, tasks = record["perplexity"], tasks_in(record)
        accuracies = [tasks[task]["acc"] for task in SEVEN if task in tasks]
        rows.append([
            f"{100 * record['accounting']['model_ratio']:.0f}%",
            record["name"],
            _runtime(record, originals.get(record.get("base_model"))),
            *[_figure(figures.get(text, {}).get("ppl")) for text in texts],
            *_word_figures(record, words),
            *[_figure(tasks[task]["acc"]) if task in tasks else "-" for task in SEVEN],
            _figure(fmean(accuracies)) if len(accuracies) == len(SEVEN) else "-",
            *[_figure(_main(tasks[task])) if task in tasks else "-" for task in more],
            *difference_cells(record, compared),
        ])  # fmt: skip
    columns = [
        "Ratio", "Method", "Runtime", *[f"{text} \u2193" for text in texts],
        *[f"{text} (words) \u2193" for text in words],
        *SEVEN.values(), "Average \u2191", *more, *difference_heads(compared),
    ]  # fmt: skip
    limits = {r["zero_shot"]["protocol"]["limit"] for r in records if "zero_shot" in r} - {None}
    note = f"; tasks: the first {', '.join(map(str, sorted(limits)))} documents of each" if limits else ""
    return Table(
        f"Ratio: share of all parameters removed; Runtime: tokens per second when decoding{note}", columns, rows
    )


def table11(records: list[dict]) -> Table:
    """The paper's Table 11: parameters, floating-point operations and tokens per second, a column for each model."""
    ordered = _by_size(records)
    sizes = [r["accounting"]["params"] for r in ordered]
    flops = [r["flops"]["total"] * r["flops"]["context"] for r in ordered]
    rows: list[list[str | float]] = [
        ["Model-size", *[_count(size) for size in sizes]],
        ["bits per expert weight", *[round(r["accounting"]["bits_per_expert_weight"], 3) for r in ordered]],
        ["FLOPs", *[f"{value:.3g}" for value in flops]],
        ["FLOPs/token", *[f"{r['flops']['total']:.3g}" for r in ordered]],
        ["Runtime", *[_runtime(r) for r in ordered]],
    ]
    compared = compared_texts(records)
    cells = [difference_cells(record, compared) for record in ordered]
    rows += [[head, *found] for head, *found in zip(difference_heads(compared), *cells)]
    contexts = sorted({r["flops"]["context"] for r in ordered})
    title = f"FLOPs: of a sequence of {', '.join(map(str, contexts))} tokens; Runtime: tokens per second when decoding"
    return Table(title, ["", *[r["name"] for r in ordered]], rows)


def table12(records: list[dict]) -> Table:
    """The paper's Table 12: each method's figures over its seeds, as mean, spread (standard deviation), range.

    A record's `sweep` says what it belongs to: runs of one recipe (`digest`, without the seed) are a row. Rows of one
    method and size are told apart by the recipe's name.
    """
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        sweep = record.get("sweep", {"method": record["name"], "samples": "-"})
        key = sweep["method"], sweep["samples"], sweep.get("digest"), sweep.get("recipe")
        groups.setdefault(key, []).append(record)
    alike = Counter((method, samples) for method, samples, *_ in groups)
    texts = texts_of(records)
    tasks = [task for task in SEVEN if any(task in tasks_in(r) for r in records)]
    compared = compared_texts(records)
    rows: list[list[str | float]] = []
    for (method, samples, _, recipe), members in groups.items():
        label = f"{method} ({recipe})" if alike[method, samples] > 1 else method
        measured = [_spread([r["perplexity"][t]["ppl"] for r in members if t in r["perplexity"]]) for t in texts]
        measured += [_with_error([tasks_in(r)[t] for r in members if t in tasks_in(r)]) for t in tasks]
        measured += [_spread(of(members, text)) for text in compared for of in (difference_means, same_tokens)]
        rows.append([label, samples, len(members), *measured])
    heads = [*texts, *[SEVEN[task] for task in tasks], *difference_heads(compared)]
    columns = ["method", "calibration windows", "runs", *heads]
    error = "; se: standard error over documents, by lm-eval, which is what the paper's \u00b1 has the size of"
    title = f"Mean \u00b1 standard deviation over seeds (smallest to largest){error if tasks else ''}"
    return Table(title, columns, rows)


TABLES = {"2": table2, "8": table8, "11": table11, "12": table12}


def _by_size(records: list[dict]) -> list[dict]:
    return sorted(records, key=lambda r: (-r["memory"]["disk_bytes"], r["name"]))


def _main(figures: dict) -> float | None:
    """The main metric of a task: its share of right answers, or the perplexity per word."""
    found = score(figures)
    return found[0] if found else figures.get("word_perplexity")


def _runtime(record: dict, original: dict | None = None) -> str | float:
    """Tokens per second when decoding at the largest batch that was timed, with the factor to the original's."""
    own = _decoded(record)
    base = _decoded(original) if original is not None and original is not record else {}
    if own and (batch := max(own)) in base:
        return f"{_figure(own[batch])} ({own[batch] / base[batch]:.2f}x)"
    return _figure(own[max(own)]) if own else "-"


def _decoded(record: dict) -> dict[int, float]:
    """Tokens per second when decoding, by batch; at the longest prompt of each."""
    cells = sorted(record.get("speed", {}).get("cells", []), key=lambda cell: cell.get("length", 0))
    return {cell["batch"]: cell["decode"]["tokens_per_second"] for cell in cells}


def _figure(value: float | None) -> str | float:
    return "-" if value is None else float(f"{value:.4g}")


def _count(size: int) -> str:
    return next(f"{size / unit:.3g}{name}" for name, unit in (("B", 1e9), ("M", 1e6), ("", 1)) if size >= unit)


def _spread(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.5g}" if values else "-"
    return f"{fmean(values):.5g} \u00b1 {stdev(values):.2g} ({min(values):.5g} to {max(values):.5g})"


def _with_error(runs: list[dict]) -> str:
    """Accuracies of a task over runs, with the mean of their standard errors where they were measured."""
    errors = [run["acc_stderr"] for run in runs if "acc_stderr" in run]
    return _spread([run["acc"] for run in runs]) + (f", se {fmean(errors):.2g}" if errors else "")


def _peak(memory: dict) -> int | None:
    """Peak of loading and generating, above what importing the libraries takes."""
    return memory["peak_rss_bytes"] - memory["import_rss_bytes"] if "peak_rss_bytes" in memory else None


def _megabytes(size: int | None) -> str | float:
    return "-" if size is None else round(size / 1e6, 3 if size < 1e9 else 1)
