"""What a survey says, in words."""

import math

from .survey import Survey

LITTLE, NOTICEABLE = 0.02, 0.1  # nats per token


def verdict(survey: Survey) -> list[str]:
    """Sentences: what may be removed, where it hurts, whether sharing pays, what calibration did not see."""
    return [_removal(survey), _texts(survey), _layers(survey), _sharing(survey), _base(survey), _coverage(survey)]


def _first(survey: Survey) -> dict[float, float]:
    return next(iter(survey.rehearsal.values()))


def _removal(survey: Survey) -> str:
    costs = _first(survey)
    free = [ratio for ratio, nats in costs.items() if nats <= LITTLE]
    dear = [ratio for ratio, nats in costs.items() if nats > NOTICEABLE]
    text = ", ".join(f"{ratio:.0%}: {math.expm1(nats):+.1%}" for ratio, nats in costs.items())
    if not free:
        return f"Removing expert parameters costs from the start (perplexity {text}); quantize instead (gptq, fit)."
    end = f"; from {dear[0]:.0%} on it hurts" if dear else ""
    return f"Up to {free[-1]:.0%} of the expert parameters may go at little cost (perplexity {text}){end}."


def _texts(survey: Survey) -> str:
    name, *others = survey.rehearsal
    worse = [o for o in others if survey.rehearsal[o][0.4] > 3 * max(survey.rehearsal[name][0.4], LITTLE / 10)]
    if not others:
        return f"Judged on {name} alone: give --text of the kind the model is used for, unlike text loses more."
    if worse:
        return f"Far more is lost on {', '.join(worse)} than on {name}: calibrate on text of that kind."
    return f"{', '.join(others)}: not much more is lost than on {name}."


def _layers(survey: Survey) -> str:
    by = sorted(survey.layers, key=lambda path: -survey.layers[path]["sensitivity"])
    first, last = (survey.layers[path]["sensitivity"] for path in (by[0], by[-1]))
    factor = first / last if last > 0 else math.inf
    return f"By MoE-SVD's metric {by[0]} is the most sensitive, {factor:.1f} times {by[-1]}."


def _mean(survey: Survey, get) -> float:
    values = [get(p) for layer in survey.layers.values() for p in layer["projections"].values() if "cka" in p]
    return sum(values) / len(values) if values else math.nan


def _sharing(survey: Survey) -> str:
    v, random = _mean(survey, lambda p: p["cka"]["V"]), _mean(survey, lambda p: p["cka"]["random"]["V"])
    figures = f"mean CKA of V {v:.2f}, of random matrices {random:.2f}"
    if v > random + 0.5 * (1 - random):
        return f"Experts share their input directions ({figures}): one V for all (moe-svd-paper) is worth a try."
    return f"Experts share few input directions ({figures}): factors of their own (svd, fit) will do better than one V."


def _base(survey: Survey) -> str:
    get = lambda p: p["effective_rank"]["deltas"] / p["effective_rank"]["weights"]  # noqa: E731
    share = _mean(survey, get)
    if share < 0.85:
        return f"What the mean expert leaves has {share:.0%} of the effective rank: a common base (d2) pays."
    return f"What the mean expert leaves has {share:.0%} of the effective rank: a common base (d2) gains little."


def _coverage(survey: Survey) -> str:
    none = sum(len(layer["coverage"]["none"]) for layer in survey.layers.values())
    few = sum(len(layer["coverage"]["few"]) for layer in survey.layers.values())
    total = sum(layer["experts"] for layer in survey.layers.values())
    if none + few == 0:
        return f"All {total} experts saw more tokens than they have inputs."
    return (
        f"Of {total} experts {none} saw no token of the calibration text and {few} fewer than they have inputs: "
        "they are judged by their layer; more calibration.samples, or other text, would tell more."
    )
