"""V sharing and U trimming (MoE-SVD section 3.3): one right factor for all experts, few left ones.

Four readings, by the name that option `share` gives them (`SHARINGS`), see docs/moe-svd.md: `refit` fits what is
borrowed anew, `equation_6`, `equation_8` and `algorithm_3` are the paper by the letter.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..memory.lazy import select
from .whitening import energy, refit_left


@dataclass(frozen=True)
class Shared:
    """left (n_left, out, r), right (n_right, r, in) float64, and the bank rows of each expert."""

    left: torch.Tensor
    right: torch.Tensor
    left_rows: list[int]
    right_rows: list[int]


def make_positive_definite(matrix: torch.Tensor, tolerance: float = 1e-6) -> torch.Tensor:
    """Algorithm 5: symmetrize; where an eigenvalue is not positive, shift all of them above `tolerance`.

    The algorithm's text repairs negative eigenvalues only; a zero one defeats Cholesky just as well. The
    tolerance is relative to the largest eigenvalue.
    """
    symmetric = (matrix + matrix.T) / 2
    values, vectors = torch.linalg.eigh(symmetric)
    floor = tolerance * values.abs().max()
    if values.min() >= floor:
        return symmetric
    repaired = vectors * (values - values.min() + floor) @ vectors.T
    return (repaired + repaired.T) / 2


def activation_weighted_svd(weight, gram, rank: int):
    """Eq. 11 and 12 by the letter: S = cholesky(gram), W S = U Sigma V. All float64.

    Returns U (out, rank), sigma (rank,), V (rank, in), S (in, in); the factors of W are U Sigma and V S^-1.
    """
    root = torch.linalg.cholesky(make_positive_definite(gram.double()))
    u, sigma, v = torch.linalg.svd(weight.double() @ root, full_matrices=False)
    return u[:, :rank], sigma[:rank], v[:rank], root


def trimmed_sources(frequency: torch.Tensor, keep_u: int) -> list[list[int]]:
    """Eq. 7 as Algorithm 3 has it: for each expert the `keep_u` most frequent of the experts that are more
    frequent than it, and itself where there are fewer."""
    order = torch.argsort(frequency, descending=True, stable=True).tolist()
    uses, sources = frequency.tolist(), []
    for expert in range(len(order)):
        chosen = [j for j in order if uses[j] > uses[expert]][:keep_u]
        sources.append(chosen if len(chosen) == keep_u else [*chosen, expert])
    return sources


def algorithm_3(weights, grams, frequency: torch.Tensor, rank: int, keep_u: int) -> Shared:
    """Algorithm 3: W_i = (sum U_j) (sum Sigma_j) V_s S_i^-1 over the sources j of expert i.

    The whitening of each expert is its own, so that the right factors V_s S_i^-1 differ: nothing is shared.
    """
    parts = [activation_weighted_svd(w, g, rank) for w, g in zip(weights, grams)]
    shared_v = parts[int(frequency.argmax())][2]
    right = torch.stack([torch.linalg.solve_triangular(s, shared_v, upper=False, left=False) for *_, s in parts])
    sources = trimmed_sources(frequency, keep_u)
    distinct = sorted({tuple(s) for s in sources})
    left = torch.stack([sum(parts[j][0] for j in s) * sum(parts[j][1] for j in s) for s in distinct])
    return Shared(left, right, [distinct.index(tuple(s)) for s in sources], list(range(len(weights))))


def equation_6(weights, grams, frequency: torch.Tensor, rank: int, keep_u: int = 0) -> Shared:
    """Eq. 6: W_i = U_i Sigma_i V_s S_s^-1, every expert's own left factor as its SVD gives it. keep_u has no effect.

    The equation does not say whose whitening is undone; that of the expert s that V comes from leaves one right factor.
    """
    left, right = _lefts_and_shared_right(weights, grams, frequency, rank)
    return _balanced(torch.stack(left), right, list(range(len(weights))))


def equation_8(weights, grams, frequency: torch.Tensor, rank: int, keep_u: int) -> Shared:
    """Eq. 7 and 8: W_i = (sum U_j Sigma_j) V_s S_s^-1 over the sources j of expert i, with one right factor."""
    left, right = _lefts_and_shared_right(weights, grams, frequency, rank)
    sources = trimmed_sources(frequency, keep_u)
    distinct = sorted({tuple(s) for s in sources})
    sums = torch.stack([torch.stack([left[j] for j in s]).sum(0) for s in distinct])
    return _balanced(sums, right, [distinct.index(tuple(s)) for s in sources])


def _lefts_and_shared_right(weights, grams, frequency: torch.Tensor, rank: int):
    """U_i Sigma_i (out, rank) of each expert, and V_s S_s^-1 (rank, in) of the most frequent one, float64."""
    first, left, right = int(frequency.argmax()), [], None
    for expert, (weight, gram) in enumerate(zip(weights, grams)):
        u, sigma, v, root = activation_weighted_svd(weight, gram, rank)
        left.append(u * sigma)
        if expert == first:
            right = torch.linalg.solve_triangular(root, v, upper=False, left=False)
    return left, right


def refit(weights, grams, frequency: torch.Tensor, rank: int, keep_u: int) -> Shared:
    """Eq. 5 to 8 made to work: V_s of the most frequent expert with its whitening undone, so that it really is
    one matrix; the left factors of the `keep_u` most frequent experts, each refitted to V_s in closed form
    under its own inputs; every other expert takes the kept left factor that hurts it least.
    """
    first = int(frequency.argmax())
    _, _, v, root = activation_weighted_svd(weights[first], grams[first], rank)
    right = torch.linalg.solve_triangular(root, v, upper=False, left=False)
    kept = torch.argsort(frequency, descending=True, stable=True)[:keep_u].tolist()
    left = torch.stack([refit_left([weights[e]], [grams[e]], [right]) for e in kept])
    rows = []
    for expert, (weight, gram) in enumerate(zip(weights, grams)):
        if expert in kept:
            rows.append(kept.index(expert))
            continue
        losses = [energy(weight.double() - u @ right, gram) for u in left]
        rows.append(losses.index(min(losses)))
    return _balanced(left, right, rows)


def _balanced(left: torch.Tensor, right: torch.Tensor, rows: list[int]) -> Shared:
    """The same products with equal norms of each column of all left factors (n_left, out, r) and row of the one right
    factor (r, in): a gauge kind to rounding."""
    scale = (right.norm(dim=1) / left.square().sum((0, 1)).sqrt().clamp(min=1e-300)).sqrt()
    return Shared(left * scale, (right / scale[:, None])[None], rows, [0] * len(rows))


SHARINGS: dict[str, Callable[..., Shared]] = {
    "refit": refit,
    "equation_6": equation_6,
    "equation_8": equation_8,
    "algorithm_3": algorithm_3,
}


def share_in_groups(make, weights, grams, frequency: torch.Tensor, rank: int, keep_u: int, groups: int) -> Shared:
    """`make` (one of SHARINGS) within each of `groups` equal groups of neighbouring experts (appendix D.3:
    DeepSeekMoE's 64 experts in 8 groups): a right factor and keep_u left ones for each group."""
    size = len(weights) // groups
    spans = [list(range(start, start + size)) for start in range(0, len(weights), size)]
    made = [make(select(weights, span), select(grams, span), frequency[span], rank, keep_u) for span in spans]
    lefts, rights = [0], [0]
    for group in made:
        lefts.append(lefts[-1] + len(group.left))
        rights.append(rights[-1] + len(group.right))
    return Shared(
        torch.cat([group.left for group in made]),
        torch.cat([group.right for group in made]),
        [row + start for group, start in zip(made, lefts) for row in group.left_rows],
        [row + start for group, start in zip(made, rights) for row in group.right_rows],
    )


def stored_factors(share: str, frequency: torch.Tensor, keep_u: int, groups: int = 1) -> tuple[int, int]:
    """How many left and right factors a layer stores; share: one of SHARINGS."""
    experts = len(frequency)
    if share == "equation_6":
        return experts, groups
    if share == "refit":
        return groups * min(keep_u, experts // groups), groups
    lefts = sum(len({tuple(s) for s in trimmed_sources(part, keep_u)}) for part in frequency.chunk(groups))
    return lefts, groups if share == "equation_8" else experts
