"""What `speed.measure` found, as a table."""

from .table import Table


def speed_table(result: dict) -> Table:
    """A row per model, batch and length: tokens per second (smallest to largest), how much faster than the first model
    as a whole and in its experts, and the share of what the machine would allow."""
    rows: list[list[str | float]] = []
    for cell in result["cells"]:
        row: list[str | float] = [cell["model"], cell["batch"], cell["length"]]
        for phase in ("prefill", "decode"):
            figures = cell[phase]
            rate, low, high = (float(f"{figures[key]:.3g}") for key in ("tokens_per_second", "min", "max"))
            share = f"{figures['tokens_per_second'] / figures['roofline']:.0%}"
            row += [
                f"{rate:g} ({low:g}..{high:g})",
                round(figures["speedup"], 2),
                round(figures["experts_speedup"], 2),
                *_processor(figures),
                share,
            ]
        rows.append(row)
    processor = ["experts x (processor time)"] if _processor(result["cells"][0]["decode"]) else []
    columns = ["model", "batch", "length"]
    columns += [
        f"{p} {what}"
        for p in ("prefill", "decode")
        for what in ("tokens/s", "x", "experts x", *processor, "of roofline")
    ]
    machine = result["machine"]
    title = (
        f"{machine['device']}, {machine['dtype'].removeprefix('torch.')}, {machine['flops'] / 1e9:.0f} GFLOP/s, "
        f"{machine['bandwidth'] / 1e9:.1f} GB/s"
    )
    return Table(title, columns, rows)


def _processor(figures: dict) -> list[float]:
    found = figures["experts_processor_speedup"]
    return [] if found is None else [round(found, 2)]
