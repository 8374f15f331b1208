"""The best path through a trellis code: which windows of a ring of bits come nearest to given weights.

Viterbi's search over 4096 states, the windows. Rings bite their own tails: the last windows go on into the first. So
the search is made twice, once around the ends of the ring, to find how they meet, and once along the whole of it (QTIP,
Tseng et al. 2024, section 3.3). Rings are searched from the end: the bits that are new are then the low ones.

Weights are rounded to eighths of the code's unit first. All sums are then exact, and every machine finds the same path.
"""

import numpy as np
import torch

from ..runtime.trellis_code import RING, VALUES, WINDOW, column_bounds, joint_columns, padded
from .feedback import HessianFactor
from .threads import on_threads, parts_of

BLOCK = 128  # inputs whose errors are passed on one by one; those of whole blocks before them in one product
STATES = 2**WINDOW


class Encoder:
    """Encodes matrices at one rate; it keeps the room that the search works in."""

    def __init__(self, rate: float, threads: int = 1):
        self.rate = rate
        self._values = VALUES.astype(np.float32)
        # Where memory begins matters: rows that are a power of two apart get into each other's way.
        self._arranged = np.empty((4, STATES + 272), np.float32)
        for k in range(1, 5):
            self._arranged[k - 1, :STATES] = self._values.reshape(-1, 2**k).T.ravel()
        # Of each thread: the costs of states, and the best of each group after each step.
        self._cost = np.empty((threads, STATES + 80), np.float32)
        self._best = np.empty((threads, RING, STATES // 2 + 144), np.float32)

    def encode(self, turned: torch.Tensor, inputs: HessianFactor) -> torch.Tensor:
        """turned (columns, rows) float32 in the unit of VALUES -> codes uint8 (columns, bytes), with the feedback of
        `inputs`, whose order keeps together what may share a ring."""
        columns, rows = turned.shape
        length, joint = padded(rows), joint_columns(rows)
        order, upper = inputs.order, inputs.upper
        codes = torch.empty(columns, int(length * self.rate) // 8, dtype=torch.uint8)
        rest, lost = turned[order], torch.empty_like(turned)  # in the order of quantization
        # Inputs that share a ring are neighbours, and follow each other: errors do not pass between them.
        rings = [*(order % joint == 0).nonzero()[:, 0].tolist(), columns]
        for block in range(0, len(rings) - 1, BLOCK // joint):
            edges = np.array(rings[block : block + BLOCK // joint + 1])
            here = slice(edges[0], edges[-1])
            before = slice(0, edges[0])
            wanted = torch.addmm(rest[here], upper[before, here].T, lost[before])
            lost[here], codes[order[here].cpu()] = self._columns(wanted, upper[here, here], rest[here], edges)
        return codes

    def _columns(self, wanted, passed_on, rest, edges) -> tuple[torch.Tensor, torch.Tensor]:
        """(errors, codes) of a block of columns; see `viterbi_numba.encode_columns`."""
        from .viterbi_numba import encode_columns

        rows = rest.shape[1]
        length, joint = padded(rows), joint_columns(rows)
        lost = np.empty((len(rest), rows), np.float32)
        codes = np.empty((len(rest), int(length * self.rate) // 8), np.uint8)
        given = [tensor.cpu().contiguous().numpy() for tensor in (wanted, passed_on, rest)]

        def encode(thread: int, bounds: np.ndarray) -> None:
            table = int(2 * self.rate), self._values, self._arranged, self._cost[thread], self._best[thread]
            encode_columns(*given, edges - edges[0], joint, bounds, *table, lost, codes)

        # Rows know nothing of each other: each thread has its own rings of all columns.
        bounds = column_bounds(rows) if joint == 1 else np.array([0, joint * length])
        on_threads(encode, [bounds[part.start : part.stop + 1] for part in parts_of(len(bounds) - 1, len(self._cost))])
        return torch.from_numpy(lost).to(rest), torch.from_numpy(codes)
