"""How much the perplexity of each model of a set differs from the original's."""

from .perplexity import relative_change
from .table import Table


def changes(records: list[dict]) -> dict[tuple[str, str], dict]:
    """{(name, text): change of perplexity against the original, with its interval} where both were measured."""
    original = next((r for r in records if r["name"] == "original"), None)
    found: dict[tuple[str, str], dict] = {}
    if original is None:
        return found
    for record in records:
        for text, figures in record["perplexity"].items():
            base = original["perplexity"].get(text, {})
            if record is not original and "window_nll" in figures and "window_nll" in base:
                found[record["name"], text] = relative_change(figures["window_nll"], base["window_nll"])
    return found


def change_table(found: dict[tuple[str, str], dict]) -> Table:
    """What `changes` found: a row for each model, a column for each text, in percent with the interval."""
    names, texts = list(dict.fromkeys(name for name, _ in found)), list(dict.fromkeys(text for _, text in found))
    rows: list[list[str | float]] = [[name, *(_cell(found.get((name, text))) for text in texts)] for name in names]
    return Table("", ["method", *texts], rows)


def _cell(change: dict | None) -> str:
    if change is None:
        return "-"
    low, middle, high = (100 * change[key] for key in ("low", "change", "high"))
    return f"{middle:+.2f} % ({low:+.2f} to {high:+.2f})"
