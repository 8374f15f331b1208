"""Which tokens meet which matrix. A copy lies in every checkpoint."""

Span = tuple[int, int, int]  # a matrix, its first token, and the one after its last
MANY = 16  # tokens of a matrix from which on kernels for CPUs make tiles of it, which torch multiplies


def spans_of(sizes: list[int]) -> list[Span]:
    """Of tokens sorted by matrix, sizes[e] of matrix e: those matrices that have some."""
    spans, start = [], 0
    for e, size in enumerate(sizes):
        if size:
            spans.append((e, start, start + size))
        start += size
    return spans


def few_and_many(spans: list[Span], limit: int = MANY) -> tuple[list[Span], list[Span]]:
    """Those of fewer tokens than `limit`, and the others."""
    return [one for one in spans if one[2] - one[1] < limit], [one for one in spans if one[2] - one[1] >= limit]
