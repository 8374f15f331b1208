"""Which layers MoE-SVD decomposes: those that its sensitivity says bear it, or those that a recipe names."""

from collections.abc import Iterator

import torch

from ..calibration.statistics import outlier_share
from ..decompose.ranks import STEP
from ..decompose.sensitivity import (
    OWL_MULTIPLE,
    Unreachable,
    choose_projections,
    layer_sensitivity,
    outlier_distribution,
    principal_rank,
    sampling_frequency,
)
from ..model.experts import find_experts, split_projections
from ..model.stream import StreamedModel
from ..planning.by_bytes import NotReachable
from ..planning.context import UNREACHED, StageError
from .svd import Svd


def require_layers(parent: StreamedModel, options: Svd) -> None:
    """Before any walk: StageError for `layers` that the model does not have, or that have no experts."""
    for layer in options.layers or ():
        if layer >= len(parent.layers):
            raise StageError(f"svd.layers: {layer}: the model has {len(parent.layers)} layers, from 0")
        if not any(True for _ in find_experts(parent.layers[layer])):
            raise StageError(f"svd.layers: {layer}: {parent.layer_names[layer]} has no experts; leave it out")


def survey_layer(experts, statistics: dict, path: str, total_tokens: int, options) -> dict:
    """What the choice of layers and the layout need of a layer: {"frequency" (E,), "sensitivity"}."""
    frequency = sampling_frequency(statistics[f"{path}/tokens"], total_tokens)
    return {"frequency": frequency, "sensitivity": _score(experts, statistics, path, frequency, options)}


def _score(experts, statistics, path, frequency, options) -> float:
    if options.select == "uniform" or options.layers is not None:
        return 0.0
    projections = split_projections(experts)
    if options.select == "owl":
        return outlier_score(experts, statistics, path)
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


def outlier_score(experts, statistics: dict, path: str) -> float:
    """OWL's score of an experts module of the original."""
    weights, norms = zip(*weights_and_norms(experts, statistics, path))
    return outlier_distribution(weights, norms, OWL_MULTIPLE)


def mean_inputs(statistics: dict, path: str) -> dict[str, torch.Tensor]:
    """Mean absolute inputs (E, in) of each projection; of an expert without tokens those of its layer."""
    tokens = statistics[f"{path}/tokens"]
    means = {}
    for key in ("abs_in", "abs_mid"):
        total = statistics[f"{path}/{key}"].double()
        means[key] = torch.where(tokens[:, None] > 0, total / tokens.clamp(min=1)[:, None], total.sum(0) / tokens.sum())
    return {"gate": means["abs_in"], "up": means["abs_in"], "down": means["abs_mid"]}


def weights_and_norms(experts, statistics: dict, path: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(weight (out, in), norms (in,) of its inputs over all tokens of the expert) of every matrix of an experts module
    of the original."""
    for name, weights in split_projections(experts).items():
        gram = statistics[f"{path}/{'gram_mid' if name == 'down' else 'gram_in'}"]
        yield from zip(weights, gram.diagonal(dim1=1, dim2=2).sqrt())


def choose_items(scores, dense, full, removed, survey, options) -> list[tuple[int, int]]:
    """(layer, projection) to decompose, see `choose_projections`. StageError where no number of layers will do."""
    if options.select == "uniform":
        everything = [(layer, p) for layer, sizes in enumerate(dense) for p in range(len(sizes))]
        if sum(map(sum, dense)) - removed <= sum(map(sum, full)):
            return everything
        least = 1 - sum(map(sum, full)) / sum(map(sum, dense))
        raise NotReachable(
            f"ratio {options.ratio}: factors shared in every layer remove at least {least:.3f}; raise it, or give "
            "another select",
            sum(map(sum, full)),
        )
    least = max(STEP / rank for entry in survey.values() for rank in entry["full"].values())
    try:
        return choose_projections(scores, dense, full, removed, least)
    except Unreachable as error:
        raise NotReachable(
            f"ratio {options.ratio} cannot be had by decomposing some of {len(scores)} layers; the nearest that can: "
            f"{error}",
            None if error.above is None else sum(map(sum, dense)) - error.above,
        ) from error


def named_paths(survey: dict, layers: list[int]) -> list[str]:
    """Paths of the experts of these layers. StageError where no token reached one."""
    found = {entry["layer"] for entry in survey.values()}
    for layer in layers:
        if layer not in found:
            raise StageError(f"svd.layers: {layer}: {UNREACHED}; leave it out, or give other calibration text")
    return [path for path, entry in survey.items() if entry["layer"] in layers]
