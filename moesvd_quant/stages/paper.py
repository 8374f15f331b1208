"""MoE-SVD's own plan for stage `svd`: sensitivity picks the layers, V is shared, U trimmed, a rank share is solved."""

import torch

from ..calibration.statistics import outlier_share
from ..checkpoint.layout import dense_layout, factor_part
from ..decompose.ranks import STEP, level_ranks
from ..decompose.sensitivity import (
    OWL_MULTIPLE,
    choose_projections,
    layer_sensitivity,
    outlier_distribution,
    principal_rank,
    sampling_frequency,
)
from ..decompose.sharing import stored_factors
from ..model.experts import split_projections
from ..planning.context import StageError
from ..planning.parts import parts_by_rank
from ..runtime.parts import FactorPart, Projections
from .svd import Svd


def survey_layer(experts, statistics: dict, path: str, total_tokens: int, options) -> dict:
    """What the choice of layers and the layout need of a layer: {"frequency" (E,), "sensitivity"}."""
    frequency = sampling_frequency(statistics[f"{path}/tokens"], total_tokens)
    return {"frequency": frequency, "sensitivity": _score(experts, statistics, path, frequency, options)}


def _score(experts, statistics, path, frequency, options) -> float:
    if options.select == "uniform":
        return 0.0
    projections = split_projections(experts)
    if options.select == "owl":
        norms = {name: statistics[f"{path}/{_gram(name)}"].diagonal(dim1=1, dim2=2).sqrt() for name in projections}
        weights = [weight for matrices in projections.values() for weight in matrices]
        return outlier_distribution(weights, [norm for name in projections for norm in norms[name]], OWL_MULTIPLE)
    factors = []
    if "f" in options.select:
        factors.append(frequency)
    if "p" in options.select:  # an expert's rank is the sum over its matrices
        ranks = [[principal_rank(w, options.principal_rank) for w in matrices] for matrices in projections.values()]
        factors.append(torch.tensor(ranks, dtype=torch.float64).sum(0))
    if "a" in options.select:
        magnitudes, total = statistics[f"{path}/magnitudes"], statistics[f"{path}/magnitude_sum"]
        factors.append(outlier_share(magnitudes, total, options.outlier))
    return layer_sensitivity(factors)


def _gram(projection: str) -> str:
    return "gram_mid" if projection == "down" else "gram_in"


def plan_paper(survey: dict, budget: int, options) -> tuple[dict, dict]:
    """Layout and decisions of the experts: `budget` parameters for all of them, spent to within a step of a rank."""
    units = {path: _units(path, entry, options) for path, entry in survey.items()}
    paths = list(survey)
    dense, full = [], []
    for path, entry in survey.items():
        sizes = {name: entry["experts"] * out * i for name, (out, i) in entry["shapes"].items()}
        entry["full"] = {
            name: min(min(shape), sizes[name] // units[path][name]) for name, shape in entry["shapes"].items()
        }
        dense.append(list(sizes.values()))
        full.append([units[path][name] * rank for name, rank in entry["full"].items()])
    total = sum(map(sum, dense))
    chosen = _choose([survey[path]["sensitivity"] for path in paths], dense, full, total - budget, survey, options)
    names = {path: list(survey[path]["shapes"]) for path in paths}
    items = [(paths[layer], names[paths[layer]][p]) for layer, p in chosen]
    items.sort(key=lambda item: -survey[item[0]]["sensitivity"])  # the most sensitive are rounded up first
    left_over = budget - (total - sum(dense[layer][p] for layer, p in chosen))
    layout: dict[str, Projections] = {}
    decisions: dict[str, dict] = {}
    for path, entry in survey.items():
        decomposed = [name for name in names[path] if (path, name) in items]
        decisions[path] = {"sensitivity": entry["sensitivity"], "decomposed": decomposed}
        layout[path] = dense_layout(entry["experts"], entry["shapes"])
    if options.share != "none":
        full_ranks = [survey[path]["full"][name] for path, name in items]
        shared = level_ranks([units[path][name] for path, name in items], full_ranks, left_over)
        ranks = {item: [rank] for item, rank in zip(items, shared)}
    else:
        ranks = own_ranks(survey, items, left_over)
    require_ranks(ranks, options.ratio)
    for (path, name), found in ranks.items():
        if options.share != "none":
            layout[path][name] = [_shared_part(survey[path], found[0], options)]
        else:
            layout[path][name] = parts_by_rank(found)
        decisions[path].setdefault("ranks", {})[name] = found[0] if options.share != "none" else found
    return layout, decisions


def require_ranks(ranks: dict[tuple[str, str], list[int]], ratio: float) -> None:
    """StageError where a matrix would be nothing at all."""
    if min(map(min, ranks.values())) == 0:
        raise StageError(f"ratio {ratio} leaves some matrices no rank at all; lower it")


def own_ranks(survey: dict, items: list[tuple[str, str]], budget: int) -> dict[tuple[str, str], list[int]]:
    """Ranks of each expert of the (path, projection) items: one share of the full rank, a step more for the first."""
    owners = [item for item in items for _ in range(survey[item[0]]["experts"])]
    shapes = [survey[path]["shapes"][name] for path, name in owners]
    found: dict[tuple[str, str], list[int]] = {}
    for item, rank in zip(owners, level_ranks([sum(s) for s in shapes], [min(s) for s in shapes], budget)):
        found.setdefault(item, []).append(rank)
    return found


def shares_factors(options: Svd, experts: int) -> bool:
    """Whether so many experts have a right factor in common. A shared expert is alone and has its own factors."""
    return options.method == "moe_svd" and options.share != "none" and experts > 1


def kept_lefts(options: Svd, group: int) -> int:
    """How many left factors a group of so many experts keeps. ValueError where it does not have as many."""
    if options.share == "equation_6":
        return group
    kept = options.keep_u if options.trim_u is None else group - options.trim_u
    if 1 <= kept <= group:
        return kept
    if options.trim_u is None:
        raise ValueError(f"keep_u {options.keep_u}: a group has {group} experts; give 1 to {group}")
    raise ValueError(f"trim_u {options.trim_u}: a group has {group} experts; give 0 to {group - 1}")


def _units(path: str, entry: dict, options) -> dict[str, int]:
    """Parameters per unit of rank of each projection, all experts together."""
    count = entry["experts"]
    lefts = rights = count
    if shares_factors(options, count):
        if count % options.groups:
            raise StageError(f"{path}: {count} experts do not part into groups: {options.groups} equal ones")
        try:
            kept = kept_lefts(options, count // options.groups)
        except ValueError as error:
            raise StageError(f"{path}: {error}") from error
        lefts, rights = stored_factors(options.share, entry["frequency"], kept, options.groups)
    entry["lefts"], entry["rights"] = lefts, rights
    return {name: lefts * out + rights * in_features for name, (out, in_features) in entry["shapes"].items()}


def _choose(scores, dense, full, removed, survey, options) -> list[tuple[int, int]]:
    if options.select == "uniform":
        everything = [(layer, p) for layer, sizes in enumerate(dense) for p in range(len(sizes))]
        if sum(map(sum, dense)) - removed <= sum(map(sum, full)):
            return everything
        least = 1 - sum(map(sum, full)) / sum(map(sum, dense))
        raise StageError(
            f"ratio {options.ratio}: factors shared in every layer remove at least {least:.3f}; raise it, or give "
            "another select"
        )
    least = max(STEP / rank for entry in survey.values() for rank in entry["full"].values())
    try:
        return choose_projections(scores, dense, full, removed, least)
    except ValueError as error:
        raise StageError(
            f"ratio {options.ratio} cannot be had by decomposing some of {len(scores)} layers; the nearest that can: "
            f"{error}"
        ) from error


def _shared_part(entry: dict, rank: int, options) -> FactorPart:
    """Which left factor an expert takes is known when the layer is done: the rows are filled in there."""
    count = entry["experts"]
    rights = [e * entry["rights"] // count for e in range(count)]
    lefts = [min(e, entry["lefts"] - 1) for e in range(count)]
    return factor_part(list(range(count)), rank, left=lefts, right=rights)
