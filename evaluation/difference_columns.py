"""What texts records have figures of; how models differ from their original, as columns of tables: only where it was
measured."""

MEASURES = ("mean", "top1")


def texts_of(records: list[dict]) -> list[str]:
    """Names of all texts that some record has figures of."""
    return list(dict.fromkeys(text for record in records for text in record["perplexity"]))


def compared_texts(records: list[dict]) -> list[str]:
    """Texts on which the difference of some record from its original was measured."""
    return list(dict.fromkeys(t for r in records for t in r["perplexity"] if difference_of(r, t)))


def difference_of(record: dict, text: str) -> dict:
    """`difference.Difference` as a record has it; nothing where it was not measured."""
    return record["perplexity"].get(text, {}).get("difference", {})


def difference_heads(texts: list[str]) -> list[str]:
    """Two columns for each of `compared_texts`: mean divergence in nats per token, share of equal top tokens."""
    return [head for text in texts for head in (f"{text}: divergence", f"{text}: same top token %")]


def difference_cells(record: dict, texts: list[str]) -> list[str | float]:
    """The cells of those columns; "-" where it was not measured, as of the original itself."""
    found = [difference_of(record, text) for text in texts]
    return [_cell(one[key], key) if one else "-" for one in found for key in MEASURES]


def difference_means(records: list[dict], text: str) -> list[float]:
    """Mean divergences, one for each record that has it."""
    return [one["mean"] for record in records if (one := difference_of(record, text))]


def same_tokens(records: list[dict], text: str) -> list[float]:
    """Shares of equal top tokens in per cent, one for each record that has it."""
    return [100 * one["top1"] for record in records if (one := difference_of(record, text))]


def _cell(value: float, key: str) -> float:
    return float(f"{value:.4g}") if key == "mean" else round(100 * value, 2)
