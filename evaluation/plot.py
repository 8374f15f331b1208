"""Perplexity against bytes: the picture every method is judged by."""

from pathlib import Path

BASELINE = ("gptq", "rtn")


def plot_bytes(records: list[dict], file: Path) -> None:
    """PNG with a panel per text: perplexity (log) against MB on disk; plain GPTQ points joined by a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    texts = list(dict.fromkeys(text for r in records for text in r["perplexity"]))
    columns = min(3, len(texts))
    rows = -(-len(texts) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5.6 * columns, 4.4 * rows), squeeze=False)
    names = list(dict.fromkeys(r["name"] for r in records))
    colours = {name: plt.get_cmap("tab10")(i % 10) for i, name in enumerate(names)}
    for axis, text in zip(axes.flat, texts):
        points = [
            (r["memory"]["disk_bytes"] / 1e6, r["perplexity"][text]["ppl"], r["name"])
            for r in records
            if text in r["perplexity"]
        ]
        base = sorted(p for p in points if p[2].startswith("gptq"))
        axis.plot([p[0] for p in base], [p[1] for p in base], "--", color="0.6", zorder=1, label="plain GPTQ")
        for size, value, name in points:
            marker = "s" if name.startswith(BASELINE) else "*" if name == "original" else "o"
            axis.scatter(size, value, marker=marker, s=90 if marker == "*" else 45, color=colours[name], label=name)
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 7.0)))
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_title(text)
        axis.set_xlabel("MB on disk")
        axis.set_ylabel("perplexity")
        axis.grid(alpha=0.25)
    for axis in list(axes.flat)[len(texts) :]:
        axis.axis("off")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=min(5, len(labels)), frameon=False)
    figure.tight_layout(rect=(0, 0.06 + 0.04 * ((len(labels) - 1) // 5), 1, 1))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)
