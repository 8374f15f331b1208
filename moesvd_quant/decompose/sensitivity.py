"""Which expert layers of a model bear decomposition (MoE-SVD, section 3.2 and appendix D.1)."""

import math
from collections.abc import Sequence

import torch

OWL_MULTIPLE = 5.0  # M of OWL, the value its authors use for most models


def sampling_frequency(tokens: torch.Tensor, total_tokens: int) -> torch.Tensor:
    """f_i of eq. 9 (E,) float64: share of all tokens whose top-k holds expert i. They add up to k in every layer."""
    return tokens.double() / total_tokens


def principal_rank(weight: torch.Tensor, threshold: float) -> int:
    """p_i of eq. 4: singular values of weight (out, in) above `threshold` times the largest (Algorithm 1)."""
    values = torch.linalg.svdvals(weight.double())
    return int((values > threshold * values[0]).sum())


def layer_sensitivity(factors: Sequence[torch.Tensor]) -> float:
    """S_L of eq. 4: the sum over experts of the product of f_i, p_i, a_i, or of some of them (Table 5), each (E,)."""
    return float(torch.stack([factor.double() for factor in factors]).prod(0).sum())


def outlier_distribution(weights: Sequence[torch.Tensor], norms: Sequence[torch.Tensor], multiple: float) -> float:
    """OWL's layer score (Yin et al. 2023, the Layerwise Outlier Distribution): the share of a layer's outlier scores
    |W_ij| ||X_j||_2 above `multiple` times their mean, over all its matrices at once.

    weights: matrices (out, in); norms: (in,) of the inputs of each.
    """
    total = count = 0.0
    for weight, norm in zip(weights, norms):
        total += float((weight.double().abs().sum(0) * norm.double().to(weight.device)).sum())
        count += weight.numel()
    edge = multiple * total / count
    above = sum(int((w.double().abs() * n.double().to(w.device) > edge).sum()) for w, n in zip(weights, norms))
    return above / count


class Unreachable(ValueError):
    """No choice of layers removes so many parameters. above: the nearest larger number that one does remove."""

    def __init__(self, message: str, above: int | None):
        super().__init__(message)
        self.above = above


def choose_projections(
    scores: Sequence[float], dense: Sequence[Sequence[int]], full: Sequence[Sequence[int]], removed: float, least: float
) -> list[tuple[int, int]]:
    """(layer, projection) to decompose so that ranks can remove exactly `removed` parameters.

    scores: sensitivity of each layer; dense[l][p]: parameters of a projection; full[l][p]: those it has factorized at
    its full rank; least: smallest share of the full rank. The least sensitive layers are taken, as few as remove
    enough at half their full rank (the papers fix no rank); where those remove too much even at their full rank, one
    fewer, down to a quarter of it; where that does not fit either, the last layer gives some of its projections only.
    Unreachable, naming the shares of all parameters that could be removed, where nothing fits.
    """
    # Scores alike to nine digits are ties: rounding of a sum must not choose a layer.
    order = sorted(range(len(scores)), key=lambda layer: (float(f"{scores[layer]:.9g}"), layer))
    items = [(layer, p) for layer in order for p in range(len(dense[layer]))]
    whole = {sum(len(dense[layer]) for layer in order[: n + 1]) for n in range(len(order))}
    held = factored = 0
    fits, reachable = [], []
    for count, (layer, p) in enumerate(items, 1):
        held, factored = held + dense[layer][p], factored + full[layer][p]
        share = (held - removed) / factored
        reachable += [held - factored, held - least * factored]
        if least <= share <= 1:
            grade = 0 if share >= 0.5 else 1 if share >= 0.25 else 3
            if count not in whole:
                grade = 2 if share >= 0.5 else 3
            fits.append((grade, count if share >= 0.5 else -share, count))
    if fits:
        return items[: min(fits)[-1]]
    total = sum(map(sum, dense))
    below = max((r for r in reachable if 0 < r <= removed), default=None)
    above = min((r for r in reachable if r >= removed), default=None)
    nearest = " and ".join(f"{r / total:.3f}" for r in (below, above) if r is not None)
    raise Unreachable(nearest, None if above is None else math.ceil(above))
