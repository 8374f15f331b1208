"""How much the perplexity of each model of a set differs from the original's."""

from .perplexity import relative_change


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
