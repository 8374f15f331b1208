"""Which experts a model can do without: a number for each, and the choice of those that are kept."""

from collections.abc import Collection, Sequence

import torch

# A value of `prune.by`, and which sums over an expert's tokens it reads.
CRITERIA = ("reap", "frequency", "weight", "norm")


def saliency(
    by: str, tokens: torch.Tensor, weight: torch.Tensor, norm: torch.Tensor, weighted: torch.Tensor
) -> torch.Tensor:
    """(E,) float64, from sums over each expert's tokens, all (E,): how many there are, the router's weight, the norm of
    the expert's output, and the product of both.

    reap: the mean of the product, REAP (Lasby et al. 2025, equation 9). frequency: tokens. weight: the sum of router
    weights (SEER). norm: the sum of norms (EAN). An expert without tokens has 0. ValueError for another criterion.
    """
    if by == "reap":
        return weighted.double() / tokens.clamp(min=1)
    if by not in CRITERIA:
        raise ValueError(f"{by!r} is none of {', '.join(CRITERIA)}")
    return {"frequency": tokens, "weight": weight, "norm": norm}[by].double()


def keep_in_layer(scores: torch.Tensor, count: int, groups: int, protected: Collection[int]) -> list[int]:
    """The `count` experts of the largest scores (E,), as many in each of `groups` groups of neighbours, protected ones
    first. Of equal ones the first. ValueError where the protected ones alone are more, or count does not divide."""
    if count % groups:
        raise ValueError(f"{count} experts cannot be spread over {groups} groups evenly")
    kept: list[int] = []
    for group in torch.arange(len(scores)).chunk(groups):
        held = [expert for expert in group.tolist() if expert in protected]
        if len(held) > count // groups:
            raise ValueError(f"{len(held)} experts are protected and {count // groups} are to be kept")
        others = [expert for expert in group.tolist() if expert not in protected]
        others.sort(key=lambda expert: -float(scores[expert]))
        kept += held + others[: count // groups - len(held)]
    return sorted(kept)


def keep_in_model(
    scores: Sequence[torch.Tensor], count: int, least: Sequence[int], protected: Sequence[Collection[int]]
) -> list[list[int]]:
    """`count` experts of all layers, by their share of the scores (E,) of their layer; each layer keeps its protected
    ones and at least so many. ValueError where these alone are more."""
    shares = [layer.double() / layer.sum().clamp(min=torch.finfo(torch.float64).tiny) for layer in scores]
    kept = [
        set(keep_in_layer(layer, max(few, len(safe)), 1, safe)) for layer, few, safe in zip(scores, least, protected)
    ]
    free = count - sum(map(len, kept))
    if free < 0:
        raise ValueError(f"{count} experts are to be kept, and layers need {count - free} at least")
    rest = [(-value, at, e) for at, share in enumerate(shares) for e, value in enumerate(share.tolist())]
    for _, at, expert in sorted(one for one in rest if one[2] not in kept[one[1]])[:free]:
        kept[at].add(expert)
    return [sorted(layer) for layer in kept]
