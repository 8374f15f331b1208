"""A map of layers and experts in the terminal: what is left of each, as a bar of an eighth to eight eighths."""

from collections.abc import Mapping, Sequence

LEVELS = "▁▂▃▄▅▆▇█"


def expert_map(bits: Mapping[str, Sequence[float]], width: int = 80) -> list[str]:
    """A line per layer: its number, a character per expert, the mean of its bits per original weight; then the legend.

    bits: {path of a module: of each of its experts}. Neighbours share a character where a line would be too long; the
    character then shows their mean.
    """
    top = max(max(row) for row in bits.values())
    longest = max(map(len, bits.values()))
    labels = [_label(path) for path in bits]
    left, right = max(map(len, labels)), len(f"{top:.2f}")
    together = -(-longest // (width - left - right - 4))
    cells = -(-longest // together)
    lines = []
    for label, row in zip(labels, bits.values()):
        drawn = "".join(_character(row[at : at + together], top) for at in range(0, len(row), together))
        lines.append(f"{label:>{left}}  {drawn:{cells}}  {sum(row) / len(row):{right}.2f}")
    each = "expert" if together == 1 else f"{together} experts"
    lines.append(
        f"layer, a character for each {each}, mean bits per weight; {LEVELS[0]} to {LEVELS[-1]}: 0 to {top:.2f}"
    )
    return lines


def _label(path: str) -> str:
    """The number of a layer; the whole path where it has none."""
    return next((part for part in path.split(".") if part.isdigit()), path)


def _character(values: Sequence[float], top: float) -> str:
    mean = sum(values) / len(values)
    return LEVELS[min(len(LEVELS) - 1, int(mean / top * len(LEVELS)))] if mean else " "
