"""Walks through a model and gathers what the report shows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from ..calibration.metric import blend, coverage
from ..calibration.statistics import outlier_share
from ..calibration.store import Statistics
from ..checkpoint.accounting import account
from ..decompose.sensitivity import layer_sensitivity, sampling_frequency
from ..decompose.whitening import whitened_spectrum
from ..model.experts import expert_count, find_experts, shapes_of, split_projections
from ..model.folder import ModelError
from ..planning.allocation import plan_ratio
from ..planning.context import Context, Plan, expert_grams, reached
from ..runtime.factorized_experts import FactorizedExperts
from ..runtime.parts import JOINT
from ..stages.paper_layers import outlier_score
from ..stages.svd import Svd
from .rehearsal import TOKENS, rehearse, rehearse_alone
from .similarity import deltas, effective_rank, expert_similarity, random_like, spectra

RATIOS = (0.2, 0.4, 0.6, 0.8)
SAMPLED = 8  # experts per layer whose spectra and similarities are looked at
PRINCIPAL, OUTLIER = 0.01, 2.0  # MoE-SVD's thresholds, as stage svd has them
ALIKE = {"gate": 1.0, "up": 1.0, "down": 1.0}  # prices of errors where all count the same
CURVE = 64  # points of a spectrum in the report

Progress = Callable[[str, int, int], None]


@dataclass
class Survey:
    """layers: figures per experts module; rehearsal: {text: {ratio: nats}}; removed: {ratio: share really removed};
    alone: {text: {ratio: {layer: nats}}} where one layer at a time loses that share of its experts."""

    layers: dict[str, dict] = field(default_factory=dict)
    rehearsal: dict[str, dict[float, float]] = field(default_factory=dict)
    removed: dict[float, float] = field(default_factory=dict)
    alone: dict[str, dict[float, dict[int, float]]] = field(default_factory=dict)


def survey(
    folder, calibration: Statistics, texts: dict[str, Statistics], report: Progress, alone: Sequence[float] = ()
) -> Survey:
    """Everything about a model folder: what it is calibrated on decides ranks, `texts` what they are judged on.

    alone: ratios at which each layer is decomposed by itself. All statistics are of the same model, in the same dtype.
    ModelError for a model without experts, or factorized.
    """
    found, model = Survey(), calibration.model(folder)
    for name, statistics in {"calibration": calibration, **texts}.items():
        if statistics.stored:  # several passes read them side by side
            statistics.ensure(partial(report, f"reading {name}"))
    count = len(model.layer_names)
    for index, own in enumerate(calibration.layers()):
        layer, at = model.load_layer(index), model.layer_names[index]
        for path, experts in find_experts(layer):
            full = f"{at}.{path}"
            if isinstance(experts, FactorizedExperts):
                raise ModelError(f"{full}: is compressed already; probe looks at original models")
            if not reached(own, path):
                continue
            found.layers[full] = _layer(experts, own, path, calibration.windows.numel())
            metrics = expert_grams(own, path, model.device, blend)
            for name, weights in split_projections(experts).items():
                values = [whitened_spectrum(w, m).cpu() for w, m in zip(weights, metrics[name])]
                found.layers[full]["projections"][name] |= _whitened(torch.stack(values))
        model.drop_layer(index)
        report("layers", index + 1, count)
    if not found.layers:
        raise ModelError(f"{folder}: no experts that text reaches; there is nothing to probe")
    context = Context(model, calibration, Svd(), 0, model.device)
    plans = _plans(found, context)
    for done, (name, statistics) in enumerate(texts.items()):
        streamed = calibration.model(folder)
        scratch = statistics.scratch((len(RATIOS) + 2) * TOKENS * statistics.sizes.row)
        found.rehearsal[name] = rehearse(streamed, statistics.windows, calibration, plans, scratch)
        report("rehearsals", done + 1, len(texts))
        if alone:
            streamed = calibration.model(folder)
            scratch = statistics.scratch((len(alone) * count + 2) * TOKENS * statistics.sizes.row)
            each = {ratio: _alike(found, context, ratio) for ratio in alone}
            found.alone[name] = rehearse_alone(streamed, statistics.windows, calibration, each, scratch)
            report("one layer at a time", done + 1, len(texts))
    return found


def _alike(found: Survey, context: Context, ratio: float) -> Plan:
    """Factors of one share of the rank for every expert, under its own inputs, as stage svd's `svd_llm` has them."""
    plan = Svd(method="svd_llm", ratio=ratio).plan(context)
    for decision in plan.decisions.values():
        decision["price"] = ALIKE
    return plan


def _plans(found: Survey, context: Context) -> dict[float, Plan]:
    """What stage svd would do at each ratio; fills in what that removes, and mean ranks."""
    plans = {}
    for ratio in RATIOS:
        plans[ratio] = plan = plan_ratio(context, ratio)
        found.removed[ratio] = account(context.parent, plan.layout).expert_ratio
        for path, layer in found.layers.items():
            for name, parts in plan.layout.experts[path].items():
                for own in ("gate", "up") if name == JOINT else (name,):
                    ranks = [part.rank or min(layer["shapes"][own]) for part in parts for _ in part.experts]
                    mean = sum(ranks) / layer["experts"]
                    layer["projections"][own].setdefault("mean_rank", {})[str(ratio)] = mean
    return plans


def _layer(experts, statistics: dict, path: str, total_tokens: int) -> dict:
    """Routing, MoE-SVD's sensitivity, and per projection effective ranks and similarities beside random ones."""
    tokens = statistics[f"{path}/tokens"]
    frequency = sampling_frequency(tokens, total_tokens)
    outliers = outlier_share(statistics[f"{path}/magnitudes"], statistics[f"{path}/magnitude_sum"], OUTLIER)
    count, rank = expert_count(experts), torch.zeros(len(tokens), dtype=torch.float64)
    step = max(1, count // SAMPLED)
    projections = {}
    for name, weights in split_projections(experts).items():
        values = torch.stack([spectra(w).cpu() for w in weights])
        rank += (values > PRINCIPAL * values[:, :1]).sum(1)
        projections[name] = _projection(weights[::step][:SAMPLED], values)
    hidden = shapes_of(experts)["down"][0]
    return {
        "experts": count,
        "shapes": {name: list(shape) for name, shape in shapes_of(experts).items()},
        "frequency": frequency.tolist(),
        "coverage": coverage(tokens, hidden),
        "sensitivity": layer_sensitivity([frequency, rank, outliers]),
        "outliers": outlier_score(experts, statistics, path),
        "projections": projections,
    }


def _projection(sample: torch.Tensor, values: torch.Tensor) -> dict:
    """sample (experts, out, in): some experts; values (all experts, k): singular values of all."""
    out, in_features = sample.shape[1:]
    random = spectra(random_like((out, in_features)))
    rank = max(1, int(0.6 * out * in_features / (out + in_features)))  # what 40 % removed leaves
    found: dict = {
        "effective_rank": {
            "weights": float(np.mean([effective_rank(v) for v in values])),
            "random": effective_rank(random),
        },
        "spectrum": {"weights": _curve(values), "random": _curve(random[None])},
    }
    if len(sample) > 1:
        left = torch.stack([spectra(d).cpu() for d in deltas(sample)])
        noise = torch.stack([random_like((out, in_features), seed) for seed in range(len(sample))])
        found["effective_rank"]["deltas"] = float(np.mean([effective_rank(v) for v in left]))
        found["spectrum"]["deltas"] = _curve(left)
        found["cka"] = expert_similarity(sample, rank) | {"rank": rank, "random": expert_similarity(noise[:3], rank)}
    return found


def _whitened(squared: torch.Tensor) -> dict:
    """Of squared whitened singular values (experts, k)."""
    values = squared.sqrt()
    return {"whitened_rank": float(np.mean([effective_rank(v) for v in values])), "whitened": _curve(values)}


def _curve(values: torch.Tensor) -> list[float]:
    """Mean over matrices of their singular values (n, k) as shares of the largest, at CURVE points."""
    shares = (values / values[:, :1].clamp(min=1e-300)).mean(0)
    at = torch.linspace(0, len(shares) - 1, min(CURVE, len(shares))).long()
    return shares[at].tolist()
