"""Stage `svd`: every expert matrix becomes low-rank factors, or stays dense where that is cheaper."""

from collections.abc import Iterator
from functools import partial

import torch

from ..allocate import DENSE, allocate, level_ranks, rank_table
from ..calibration.metric import METRIC, blend, shrink
from ..calibration.statistics import outlier_share
from ..decompose.sensitivity import layer_sensitivity, principal_rank, sampling_frequency, select_layers
from ..decompose.sharing import left_count, literal, share_and_trim
from ..decompose.whitening import whitened_spectrum, whitened_svd
from ..layout import dense_layout, factor_part, layout_of, parts_by_rank
from ..model.experts import expert_count, find_experts, shapes_of, split_projections
from ..model.modeling_moesvd import FactorizedExperts
from .allocation import plan_budget
from .base import (
    UNREACHED,
    Context,
    Plan,
    StageError,
    errors_of,
    expert_grams,
    factorized,
    reached,
    require_experts,
    weak_experts,
)


def plan(context: Context) -> Plan:
    """Ranks of all experts under the ratio, by the method of the options."""
    require_experts(context.parent)
    if context.options.is_open():
        return plan_budget(context, ranks=True)
    survey, kept = _survey(context)
    total = sum(entry["experts"] * out * i for entry in survey.values() for out, i in entry["shapes"].values())
    budget = int(total * (1 - context.options.ratio))
    decide = {"global": _plan_global, "uniform": _plan_uniform, "paper": _plan_paper}[context.options.method]
    layout = layout_of(context.parent)
    layout["experts"], decisions = decide(survey, budget, context.options)
    for path, entry in survey.items():
        decisions.setdefault(path, {})["weak_experts"] = entry["weak"]
    return Plan(layout, decisions | ({"kept in 16 bit": kept} if kept else {}))


def _survey(context: Context) -> tuple[dict[str, dict], dict[str, str]]:
    """Per experts module: shapes, and what the method needs of weights and statistics; and modules that are kept."""
    found = dict(context.each_layer(_survey_layer, context.surveyed))
    survey = {path: entry for index in sorted(found) for path, entry in found[index].items()}
    unreached = {path: UNREACHED for path, entry in survey.items() if entry is None}
    survey = {path: entry for path, entry in survey.items() if entry is not None}
    if not survey:
        raise StageError("no calibration token reached any expert; give other calibration text")
    return survey, unreached


def _survey_layer(context: Context, index: int, layer, statistics: dict) -> dict[str, dict | None]:
    """The same of the experts modules of one layer; None for those that no token reached."""
    options, name = context.options, context.parent.layer_names[index]
    found: dict[str, dict | None] = {}
    for path, experts in find_experts(layer):
        full = f"{name}.{path}"
        if isinstance(experts, FactorizedExperts):
            raise StageError(f"{full}: is factorized already; stage svd needs an original model")
        if not reached(statistics, path):
            found[full] = None
            continue
        entry: dict = {"shapes": shapes_of(experts), "experts": expert_count(experts)}
        entry["weak"] = weak_experts(statistics, path)
        if options.method == "global":
            make = partial(_spectra, experts, statistics, path, context.device)
            kept = context.statistics.kept(f"spectra-{METRIC}-{full}", make)
            entry["spectra"] = {name: kept[name].numpy() for name in entry["shapes"]}
        if options.method == "paper":
            tokens = statistics[f"{path}/tokens"]
            entry["frequency"] = sampling_frequency(tokens, context.statistics.windows.numel())
            magnitudes, total = statistics[f"{path}/magnitudes"], statistics[f"{path}/magnitude_sum"]
            outliers = outlier_share(magnitudes, total, options.outlier)
            ranks = _principal_ranks(experts, options.principal_rank)
            entry["sensitivity"] = layer_sensitivity(entry["frequency"], ranks, outliers)
        found[full] = entry
    return found


def _metric(options):
    """The published methods are judged, and factorized, by each expert's own inputs."""
    return blend if options.method == "global" else shrink


def _spectra(experts, statistics: dict, path: str, device) -> dict[str, torch.Tensor]:
    """Squared whitened singular values (E, k) of each projection."""
    grams = expert_grams(statistics, path, device)
    return {
        name: torch.stack([whitened_spectrum(w, g) for w, g in zip(weights, grams[name])]).cpu()
        for name, weights in split_projections(experts).items()
    }


def _principal_ranks(experts, threshold):
    """p_i summed over the expert's matrices (E,) float64."""
    ranks = [[principal_rank(w, threshold) for w in weights] for weights in split_projections(experts).values()]
    return torch.tensor(ranks, dtype=torch.float64).sum(0)


def _plan_global(survey, budget, options):
    tables = {
        (path, name): rank_table(spectra, entry["shapes"][name])
        for path, entry in survey.items()
        for name, spectra in entry["spectra"].items()
    }
    layout: dict = {}
    decisions: dict = {}
    for (path, name), chosen in allocate(tables, budget).choices.items():
        ranks = [choice.rank for choice in chosen]
        layout.setdefault(path, {})[name] = parts_by_rank(ranks)
        decisions.setdefault(path, {}).setdefault("ranks", {})[name] = ["dense" if r == DENSE else r for r in ranks]
    return layout, decisions


def _plan_uniform(survey, budget, options):
    """One share of the full rank for every matrix: SVD-LLM per expert."""
    keys = [(path, name) for path, entry in survey.items() for name in entry["shapes"]]
    shapes = [survey[path]["shapes"][name] for path, name in keys]
    counts = [survey[path]["experts"] for path, _ in keys]
    ranks = level_ranks([n * sum(s) for n, s in zip(counts, shapes)], [min(s) for s in shapes], budget)
    layout: dict = {}
    decisions: dict = {}
    for (path, name), rank, count in zip(keys, ranks, counts):
        layout.setdefault(path, {})[name] = parts_by_rank([rank] * count)
        decisions.setdefault(path, {}).setdefault("ranks", {})[name] = rank
    return layout, decisions


def _plan_paper(survey, budget, options):
    """Sensitivity picks the layers; one rank share for their projections solves the rest."""
    paths = list(survey)
    lefts = {path: left_count(entry["frequency"], options.keep_u, options.literal) for path, entry in survey.items()}

    def unit(path, name):  # parameters per unit of rank
        out, in_features = survey[path]["shapes"][name]
        return lefts[path] * out + (survey[path]["experts"] if options.literal else 1) * in_features

    dense = {path: sum(e["experts"] * o * i for o, i in e["shapes"].values()) for path, e in survey.items()}
    halved = max(sum(unit(p, n) * min(s) / 2 for n, s in survey[p]["shapes"].items()) / dense[p] for p in paths)
    sensitivity = [survey[path]["sensitivity"] for path in paths]
    selected = {paths[i] for i in select_layers(sensitivity, options.ratio, halved)}
    order = sorted(selected, key=lambda path: -survey[path]["sensitivity"])
    items = [(path, name) for path in order for name in survey[path]["shapes"]]
    left_over = budget - sum(size for path, size in dense.items() if path not in selected)
    ranks = level_ranks([unit(*item) for item in items], [min(survey[p]["shapes"][n]) for p, n in items], left_over)
    if min(ranks) == 0:
        raise StageError(f"ratio {options.ratio} leaves some matrices no rank at all; lower it")
    layout, decisions = {}, {}
    for path in paths:
        entry = survey[path]
        decisions[path] = {"sensitivity": entry["sensitivity"], "decomposed": path in selected}
        layout[path] = dense_layout(entry["experts"], entry["shapes"])
    for (path, name), rank in zip(items, ranks):
        count = survey[path]["experts"]
        right = list(range(count)) if options.literal else [0] * count
        # Which left factor an expert takes is known when the layer is done: the rows are filled in there.
        rows = [min(e, lefts[path] - 1) for e in range(count)]
        layout[path][name] = [factor_part(list(range(count)), rank, left=rows, right=right)]
        decisions[path].setdefault("ranks", {})[name] = rank
    return layout, decisions


def run_layer(context: Context, index: int, layer, statistics: dict, plan: Plan) -> dict:
    """Replaces the experts of a loaded layer as planned. Returns errors per projection and expert."""
    report = {}
    for path, native in list(find_experts(layer)):
        full = f"{context.parent.layer_names[index]}.{path}"
        if full not in plan.layout["experts"]:
            continue
        grams = expert_grams(statistics, path, context.device, _metric(context.options))
        weights = split_projections(native)
        frequency = sampling_frequency(statistics[f"{path}/tokens"], context.statistics.windows.numel())
        layout = plan.layout["experts"][full]
        banks = (
            (f"{name}_{i}_{bank}", row, value)
            for name, parts in layout.items()
            for i, part in enumerate(parts)
            for bank, row, value in _banks(part, weights[name], grams[name], frequency, context.options)
        )
        made = factorized(native, layout, banks)
        layer.set_submodule(path, made)
        report[full] = errors_of(made, weights, grams)
    return report


def _banks(part, weights, grams, frequency, options) -> Iterator[tuple[str, int | None, torch.Tensor]]:
    """(bank, row or None for all, tensor) of one part; the left rows of a shared part are set in it."""
    experts = part["experts"]
    if "dense" in part:
        yield from (("dense", row, weights[e]) for row, e in enumerate(experts))
    elif options.method == "paper":
        make = literal if options.literal else share_and_trim
        made = make(list(weights), grams, frequency, part["rank"], options.keep_u)
        part["left"], part["right"] = made.left_rows, made.right_rows
        yield from (("left", None, made.left), ("right", None, made.right))
    else:
        for row, e in enumerate(experts):
            left, right = whitened_svd(weights[e], grams[e], part["rank"])
            yield from (("left", row, left), ("right", row, right))
