"""Which weights of a matrix go: patterns, Wanda's choice, and OWL's shares of layers. SparseGPT is in `quantize`."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

OWL_SPREAD = 0.08  # lambda of OWL: how far a layer's share may be from the model's


class Pattern(NamedTuple):
    """How much goes, and where: `ratio` of each row, or `ratio` of every `group` neighbouring inputs of a row."""

    ratio: float
    group: int | None = None


TWO_OF_FOUR = Pattern(0.5, 4)


def least(scores: torch.Tensor, count: int) -> torch.Tensor:
    """True for the `count` least of the last dimension of scores (..., n); of equal ones the first."""
    order = scores.argsort(dim=-1, stable=True)[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)


def wanda_mask(weight: torch.Tensor, norms: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """(out, in) bool, true for the weights that stay: those of the largest |W_ij| ||X_j||_2 of their row, or of their
    group of a row (Wanda, Sun et al. 2023, equation 1).

    weight (out, in); norms (in,) of the inputs. ValueError where groups do not divide the inputs.
    """
    scores = weight.double().abs() * norms.double()
    if pattern.group is None:
        return ~least(scores, int(weight.shape[1] * pattern.ratio))
    require_groups(weight.shape[1], pattern.group)
    return ~least(scores.unflatten(-1, (-1, pattern.group)), int(pattern.group * pattern.ratio)).flatten(-2)


def wanda_kept(shape: tuple[int, int], pattern: Pattern) -> int:
    """How many weights `wanda_mask` keeps of a matrix (out, in)."""
    out, columns = shape
    if pattern.group is None:
        return out * (columns - int(columns * pattern.ratio))
    require_groups(columns, pattern.group)
    return out * columns // pattern.group * (pattern.group - int(pattern.group * pattern.ratio))


def require_groups(columns: int, group: int) -> None:
    """ValueError where groups do not divide the inputs of a matrix."""
    if columns % group:
        raise ValueError(f"{columns} inputs do not part into groups of {group}; use pattern: unstructured")


def owl_shares(scores: Sequence[float], sizes: Sequence[int], kept: float, spread: float = OWL_SPREAD) -> list[float]:
    """The share of its weights that each layer keeps, OWL (Yin et al. 2023): linear in the layer's outlier score
    (`sensitivity.outlier_distribution`), 2 * spread between the least and the most, and `kept` of all together.

    sizes: weights of each layer; where these are equal, as in the paper, the plain mean of the shares is `kept`.
    ValueError where a layer would keep more than it has, or nothing.
    """
    low, high = min(scores), max(scores)
    raised = [2 * spread * (score - low) / (high - low) if high > low else 0.0 for score in scores]
    mean = sum(share * size for share, size in zip(raised, sizes)) / sum(sizes)
    shares = [share - mean + kept for share in raised]
    for layer, share in enumerate(shares):
        if not 0 < share < 1:
            raise ValueError(f"layer {layer + 1} of {len(shares)} would keep {share:.1%}")
    return shares
