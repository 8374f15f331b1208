"""A survey as tables for a terminal, and as pictures."""

import math
from pathlib import Path

from .survey import Survey


def survey_tables(survey: Survey) -> list[tuple[str, list[str], list[list[str | float]]]]:
    """(title, columns, rows) of what was found: by layer and projection effective ranks (share of a random matrix's)
    and similarities; by layer routing and sensitivity; costs."""
    ranks: list[list[str | float]] = []
    use: list[list[str | float]] = []
    for path, layer in survey.layers.items():
        short = path.removeprefix("model.layers.")
        for name, found in layer["projections"].items():
            rank = found["effective_rank"]
            share = lambda value, rank=rank: "-" if value is None else f"{value / rank['random']:.2f}"  # noqa: E731
            cka = found.get("cka")
            similar = [f"{cka[k]:.2f} ({cka['random'][k]:.2f})" if cka else "-" for k in "WUV"]
            shares = [share(rank["weights"]), share(rank.get("deltas")), share(found["whitened_rank"])]
            ranks.append([short, name, *shares, *similar])
        busy = [f"{f:.1%}" for f in (max(layer["frequency"]), min(layer["frequency"]))]
        weak = [str(len(layer["coverage"][kind])) for kind in ("none", "few")]
        use.append([short, str(layer["experts"]), *busy, *weak, f"{layer['sensitivity']:.4g}"])
    removed = [f"{ratio:.0%} removed" for ratio in survey.removed]
    costs: list[list[str | float]] = [
        [text, *(_times(nats) for nats in rehearsed.values())] for text, rehearsed in survey.rehearsal.items()
    ]
    alike = "effective rank, a random matrix's being 1; mean CKA between experts (random in brackets)"
    similar = ["layer", "projection", "weights", "deltas", "whitened", "CKA W", "CKA U", "CKA V"]
    routed = ["layer", "experts", "busiest", "idlest", "no token", "few tokens", "sensitivity"]
    rehearsed = "perplexity of `svd` in 16 bit, times the original's: rehearsed"
    return [
        (alike, similar, ranks), ("routing and sensitivity", routed, use), (rehearsed, ["text", *removed], costs)
    ]  # fmt: skip


def plot_survey(survey: Survey, out: Path) -> list[Path]:
    """spectra.png, experts.png, costs.png and layers.png in a folder."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    out.mkdir(parents=True, exist_ok=True)
    names = list(next(iter(survey.layers.values()))["projections"])
    figure, axes = plt.subplots(3, len(names), figsize=(4.4 * len(names), 9.6), squeeze=False, sharey="row")
    layers = [layer["projections"] for layer in survey.layers.values()]
    for column, name in enumerate(names):
        kinds = {"weights": lambda p: p["spectrum"]["weights"], "deltas": lambda p: p["spectrum"].get("deltas")}
        kinds["whitened"] = lambda p: p["whitened"]
        for row, (kind, get) in enumerate(kinds.items()):
            axis = axes[row][column]
            for index, projections in enumerate(layers):
                if (curve := get(projections[name])) is not None:
                    colour = plt.get_cmap("viridis")(index / max(1, len(layers) - 1))
                    axis.semilogy(_axis(curve), [max(v, 1e-6) for v in curve], color=colour, alpha=0.8)
            random = layers[0][name]["spectrum"]["random"]
            axis.semilogy(_axis(random), random, "k--", label="random matrix")
            axis.set_title(f"{name}: {kind}")
            axis.grid(alpha=0.25)
    axes[0][0].legend()
    figure.supxlabel("rank, as a share of the full one (light: late layers)")
    figure.supylabel("singular value, as a share of the largest")
    made = [_save(figure, out / "spectra.png")]

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    at = range(len(layers))
    for kind, style in zip("WUV", "o^s"):
        values = [_over(p, lambda f, k=kind: f["cka"][k]) for p in layers]
        left.plot(at, values, style + "-", label=f"CKA of {kind}")
    left.plot(at, [_over(p, lambda f: f["cka"]["random"]["V"]) for p in layers], "k--", label="V of random matrices")
    right.bar(at, [layer["sensitivity"] for layer in survey.layers.values()])
    left.set_title("similarity of a layer's experts")
    right.set_title("sensitivity (MoE-SVD, figure 8)")
    left.legend()
    for axis in (left, right):
        axis.set_xlabel("expert layer")
        axis.grid(alpha=0.25)
    made.append(_save(figure, out / "experts.png"))

    figure, axis = plt.subplots(figsize=(6, 4))
    for text, rehearsed in survey.rehearsal.items():
        removed = [100 * survey.removed[ratio] for ratio in rehearsed]
        axis.semilogy(removed, [max(nats, 1e-5) for nats in rehearsed.values()], "o-", label=text)
    axis.set_xlabel("expert parameters removed, %")
    axis.set_ylabel("rise of log-perplexity, nats")
    axis.grid(alpha=0.25)
    axis.legend()
    made.append(_save(figure, out / "costs.png"))
    return [*made, _plot_layers(survey, out / "layers.png")]


def _plot_layers(survey: Survey, file: Path) -> Path:
    """MoE-SVD's Figure 1, left and middle: what each layer costs by itself, where that was asked for, and how MoE-SVD's
    and OWL's scores see it."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, axes = plt.subplots(1, 1 + len(survey.alone), figsize=(5.4 * (1 + len(survey.alone)), 4), squeeze=False)
    for axis, (text, ratios) in zip(axes[0], survey.alone.items()):
        for ratio, rises in ratios.items():
            axis.plot(list(rises), [math.exp(nats) for nats in rises.values()], "o-", label=f"{ratio:.0%} removed")
        axis.set(title=f"perplexity, times the original's, {text}:\none layer decomposed by itself", xlabel="layer")
        axis.legend()
    axis, at = axes[0][-1], range(len(survey.layers))
    for key, style, label in (("sensitivity", "o-", "S_L of MoE-SVD"), ("outliers", "s--", "outliers of OWL")):
        values = [layer[key] for layer in survey.layers.values()]
        axis.plot(at, [value / max(max(values), 1e-300) for value in values], style, label=label)
    axis.set(title="scores of layers, of the largest", xlabel="expert layer", ylim=(0, 1.05))
    axis.legend()
    for axis in axes[0]:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.25)
    return _save(figure, file)


def _times(nats: float) -> str:
    return f"{math.exp(min(nats, 700)):.4g}"


def _axis(curve: list[float]) -> list[float]:
    return [i / max(1, len(curve) - 1) for i in range(len(curve))]


def _over(projections: dict, get) -> float:
    values = [get(found) for found in projections.values() if "cka" in found]
    return sum(values) / len(values) if values else math.nan


def _save(figure, file: Path) -> Path:
    import matplotlib.pyplot as plt

    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)
    return file
