"""Ranks of the published factorizations per expert: one share for all, OWL's shares of layers, ASVD's search, or
MoE-I²'s importance of experts."""

import torch

from ..calibration.truncation import truncation_losses
from ..decompose.baselines import asvd
from ..decompose.ranks import STEP, importance_ranks
from ..decompose.sparsity import owl_shares
from ..decompose.truncation import RATIOS, SAMPLES, rank_of, search_truncation
from ..planning.by_bytes import NotReachable
from ..planning.context import Context, reached
from ..planning.knapsack import DENSE
from ..planning.parts import parts_by_rank
from .importance import importance_of
from .paper import own_ranks, require_ranks
from .paper_layers import mean_inputs
from .svd import Svd

Ranks = dict[tuple[str, str], list[int]]  # of each expert, by (path, projection)


def plan_own(context: Context, survey: dict[str, dict], budget: int, options: Svd) -> tuple[dict, dict]:
    """Layout and decisions of experts with own factors, `budget` parameters together."""
    if options.ranks == "strs":
        ranks = _searched(context, survey, budget, options)
    elif options.ranks == "owl":
        ranks = _by_outliers(survey, budget)
    elif options.ranks == "importance":
        ranks = _by_importance(context, survey, budget, options)
    else:  # one share of the full rank for every matrix: what SVD-LLM does, and ASVD without its search
        ranks = own_ranks(survey, _items(survey), budget)
    require_ranks(ranks)
    layout: dict = {}
    decisions: dict = {}
    for (path, name), found in ranks.items():
        layout.setdefault(path, {})[name] = parts_by_rank(found)
        said: list = ["dense" if rank == DENSE else rank for rank in found]
        decisions.setdefault(path, {}).setdefault("ranks", {})[name] = said
    return layout, decisions


def _items(survey: dict[str, dict]) -> list[tuple[str, str]]:
    return [(path, name) for path, entry in survey.items() for name in entry["shapes"]]


def _size(entry: dict) -> int:
    """Parameters of an experts module."""
    return entry["experts"] * sum(out * in_features for out, in_features in entry["shapes"].values())


def _by_outliers(survey: dict[str, dict], budget: int) -> Ranks:
    """One share of the full rank in each layer, OWL's, in place of the share of weights that it prunes."""
    sizes = [_size(entry) for entry in survey.values()]
    try:
        shares = owl_shares([entry["outliers"] for entry in survey.values()], sizes, budget / sum(sizes))
    except ValueError as error:
        raise NotReachable(f"svd.ranks: owl: {error}; give a ratio nearer to a half") from error
    ranks: Ranks = {}
    for (path, entry), size, share in zip(survey.items(), sizes, shares):
        ranks |= own_ranks(survey, [(path, name) for name in entry["shapes"]], int(share * size))
    return ranks


def _by_importance(context: Context, survey: dict[str, dict], budget: int, options: Svd) -> Ranks:
    """In each layer by the importance of its experts; all layers keep the same share."""
    importance = importance_of(context, list(survey))
    ranks: Ranks = {}
    whole = sum(map(_size, survey.values()))
    for path, entry in survey.items():
        items = [(name, shape) for name, shape in entry["shapes"].items() for _ in importance[path]]
        weights = importance[path] * len(entry["shapes"])
        costs, full = [sum(shape) for _, shape in items], [min(shape) for _, shape in items]
        try:
            found = importance_ranks(weights, options.power, costs, full, budget * _size(entry) // whole)
        except ValueError as error:
            raise NotReachable(f"{path}: svd.ranks: importance: {error}; lower the ratio") from error
        for (name, _), rank in zip(items, found):
            ranks.setdefault((path, name), []).append(rank)
    return ranks


def _searched(context: Context, survey: dict[str, dict], budget: int, options: Svd) -> Ranks:
    """ASVD's search, over the projections of layers; what it leaves goes to those that lose most, a step each."""
    items, losses = _items(survey), _losses(context, survey, options)
    shapes = [survey[path]["shapes"][name] for path, name in items]
    counts = [survey[path]["experts"] for path, _ in items]
    tried = [_ranks(shape) for shape in shapes]
    costs = [[n * rank * sum(shape) for rank in own] for n, shape, own in zip(counts, shapes, tried)]
    whole = [n * out * in_features for n, (out, in_features) in zip(counts, shapes)]
    try:
        taken = search_truncation([losses[item] for item in items], costs, whole, budget)
    except ValueError as error:
        raise NotReachable(f"svd.ranks: strs: {error}; lower the ratio") from error
    ranks = {item: [DENSE if k is None else own[k]] * n for item, k, own, n in zip(items, taken, tried, counts)}
    left = budget - sum(size if k is None else cost[k] for size, cost, k in zip(whole, costs, taken))
    truncated = [(losses[item][k], item, shape) for item, k, shape in zip(items, taken, shapes) if k is not None]
    for _, item, shape in sorted(truncated, reverse=True):
        for expert, rank in enumerate(ranks[item]):
            if STEP * sum(shape) <= left and rank + STEP <= min(shape):
                ranks[item][expert] += STEP
                left -= STEP * sum(shape)
    return ranks


def _ranks(shape: tuple[int, int]) -> list[int]:
    """The ranks that are tried of a matrix (out, in)."""
    return sorted({rank_of(ratio, shape) for ratio in RATIOS})


def _losses(context: Context, survey: dict[str, dict], options: Svd) -> dict[tuple[str, str], list[float]]:
    """The loss at each of `_ranks` where the experts of one projection of one layer alone are truncated; kept."""
    known = context.statistics
    windows = known.windows[:SAMPLES]

    def make() -> dict[str, torch.Tensor]:
        streamed = known.model()
        layers = enumerate(known.layers(context.progress))
        index, statistics = next(layers)

        def factors(at: int, path: str, projection: str, weights: torch.Tensor) -> list:
            nonlocal index, statistics
            while index < at:
                index, statistics = next(layers)
            if not reached(statistics, path):  # it stays as it is
                return []
            magnitude = mean_inputs(statistics, path)[projection].to(weights.device)
            rank = min(weights.shape[1:])
            return [asvd(weight, own, options.alpha, rank) for weight, own in zip(weights, magnitude)]

        copies = len(RATIOS) * len(_items(survey)) + 2
        scratch = known.scratch(copies * windows.numel() * known.sizes.row)
        found = truncation_losses(streamed, windows, factors, _ranks, known.batch_size, context.surveyed, scratch)
        return {f"{path}/{name}": torch.tensor(losses, dtype=torch.float64) for (path, name), losses in found.items()}

    kept = known.kept("truncation", make, alpha=options.alpha, samples=SAMPLES, ratios=RATIOS)
    return {(path, name): kept[f"{path}/{name}"].tolist() for path, name in _items(survey)}
