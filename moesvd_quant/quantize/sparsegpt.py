"""SparseGPT: which weights of a matrix go, and how the others make up for it."""

import torch

from ..decompose.sparsity import Pattern, least, require_groups, wanda_kept
from .feedback import HessianFactor

BLOCK = 128  # inputs whose errors are passed on one by one, and of which a pattern without groups chooses at a time


@torch.no_grad()
def sparsegpt(weight: torch.Tensor, inputs: HessianFactor, pattern: Pattern) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights (out, in) float32, mask (out, in) bool) of SparseGPT (Frantar and Alistarh 2023, algorithm 1): input
    after input, what goes is made up for by the inputs after it.

    inputs: `HessianFactor.in_place` of the inputs' Gram matrix. A weight's score is w^2 over the diagonal of the
    inverse Hessian of the inputs from its own on, which is w^2 times its conditional variance. Of each block of BLOCK
    inputs the ratio goes, in whatever rows; of groups, the ratio of each group of each row. Scores are taken when the
    block or the group is reached. ValueError where groups do not divide the inputs.
    """
    rows = weight.T.float().clone()  # an input each: what is done by rows is done along the memory
    count = len(rows)
    if pattern.group is not None:
        require_groups(count, pattern.group)
    # What is missing at input i moves input j > i by that much times -passed[i, j].
    eye = torch.eye(count, device=rows.device)
    passed = torch.linalg.solve_triangular(inputs.upper, eye, upper=True, unitriangular=True)
    variance = inputs.conditional_variance.float()
    goes = torch.zeros_like(rows, dtype=torch.bool)
    step = pattern.group or BLOCK
    for first in range(0, count, BLOCK):
        end = min(first + BLOCK, count)
        missing = torch.zeros_like(rows[first:end])
        for i in range(first, end):
            if (i - first) % step == 0:
                here = slice(i, min(i + step, end))
                scores = rows[here].square() * variance[here, None]
                goes[here] = _chosen(scores, pattern)
            missing[i - first] = rows[i] * goes[i]
            rows[i:end] -= torch.outer(passed[i, i:end], missing[i - first])
        rows[end:] -= passed[first:end, end:].T @ missing
    return rows.T.contiguous(), ~goes.T


def _chosen(scores: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Which go, of the scores (inputs, out) of a block or of a group."""
    if pattern.group is None:
        return least(scores.T.flatten(), int(scores.numel() * pattern.ratio)).view(scores.T.shape).T
    return least(scores.T, int(pattern.group * pattern.ratio)).T


def sparsegpt_kept(shape: tuple[int, int], pattern: Pattern) -> int:
    """How many weights `sparsegpt` keeps of a matrix (out, in)."""
    out, columns = shape
    if pattern.group is not None:
        return wanda_kept(shape, pattern)
    blocks = (out * min(BLOCK, columns - first) for first in range(0, columns, BLOCK))
    return sum(block - int(block * pattern.ratio) for block in blocks)
