"""All parts of a projection at once, where they are trellis codes, on a CPU. A copy lies in every checkpoint.

Inputs are turned once for all parts, and outputs turned back once. In between, whatever part its expert belongs to, a
token meets right factors and dense matrices in one step, and left factors in another.
"""

from itertools import pairwise

import numpy as np
import torch

from .formats import Link
from .spans import spans_of
from .trellis_kernels import Job, multiply
from .turning import turn_rows, turn_rows_back


def fit_together(chains: list[list[Link]]) -> bool:
    """Whether all inputs are turned alike and all outputs are, and nothing between factors is."""
    inputs, outputs = {chain[0].form.columns for chain in chains}, {chain[-1].form.rows for chain in chains}
    between = any(a.form.rows or b.form.columns for chain in chains for a, b in pairwise(chain))
    return len(inputs) == 1 and len(outputs) == 1 and not between


def project(chains: list[list[Link]], x: torch.Tensor, token: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """x (tokens, in) -> (pairs, out), in its dtype, for pairs sorted by expert, sizes[e] pairs of expert e; token: the
    row of x of each pair. Each expert belongs to one chain at most."""
    given = x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if chains[0][0].form.columns:
        turn_rows(given)
    given, y = given[token], torch.zeros(len(token), chains[0][-1].shape[0])
    scale, experts = np.zeros(len(token), np.float32), spans_of(sizes)
    steps: list[list[Job]] = [[] for _ in range(max(map(len, chains)))]
    for chain in chains:
        own = [span for span in experts if chain[0].rows[span[0]] >= 0]
        if not own:
            continue
        h, scales = given, [link.form.scales(link.stored, link.shape) for link in chain]
        for expert, start, stop in own:
            scale[start:stop] = np.prod([each[link.rows[expert]] for each, link in zip(scales, chain)])
        for link, jobs in zip(chain, steps):
            out = y if link is chain[-1] else torch.empty(len(token), link.shape[0])
            spans = [(link.rows[expert], start, stop) for expert, start, stop in own]
            jobs.append(Job(link.stored["codes"], link.form.rate, h, out, spans))
            h = out
    for jobs in steps:
        multiply(jobs, x.dtype)
    if chains[0][-1].form.rows:
        turn_rows_back(y, scale)
    else:
        y *= torch.from_numpy(scale)[:, None]
    return y.to(x.dtype)
