"""Quantizing factors together: rotate the bottleneck, quantize the right one, refit the left one to it, and in turn."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ..decompose.whitening import balance, energy, left_sums, refit_right, solved_left
from ..memory.lazy import LazySequence, select
from ..runtime.formats import Format
from .codec import Codecs, PackedMatrix

# How often both factors are fitted anew, each to the quantized other: 2 take a fifth off the error that quantization
# adds, 6 not quite a third (docs/results/choices.md).
ROUNDS = 2


def rotation(rank: int, seed: int) -> torch.Tensor:
    """A random orthogonal (rank, rank) float64: spreads a bottleneck's outliers over all its directions."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def quantize_factors(
    targets: Sequence[torch.Tensor],
    grams: Sequence[torch.Tensor],
    left: Sequence[torch.Tensor],
    right: Sequence[torch.Tensor],
    left_rows: list[int],
    right_rows: list[int],
    forms: dict[str, Format],
    codec: Codecs,
    seed: int,
) -> tuple[list[PackedMatrix], list[PackedMatrix]]:
    """Packs the banks left n_left x (out, r) and right n_right x (r, in) of the experts that use them.

    targets: the weights (out, in) the products stand for; grams (in, in) of their inputs; rows: bank row of
    each expert; forms: of the banks "left" and "right". Targets, grams and banks may be made on demand: no more is
    asked for at a time than one product needs.

    The product is free up to left T, T^-1 right: directions are balanced and the bottleneck rotated, which
    costs nothing at run time. A right row is quantized for the summed inputs of its experts; a left row is
    refitted in closed form to the *quantized* right ones and quantized for what they put out. Right rows of one
    expert each are then refitted to the quantized left ones, and so on, while that lowers the error, ROUNDS times.
    """
    turn = rotation(len(right[0]), seed).to(right[0].device)
    lefts: dict[int, PackedMatrix] = {}
    rights: dict[int, PackedMatrix] = {}
    for users in connected(left_rows, right_rows):
        lower, upper = (sorted({rows[e] for e in users}) for rows in (left_rows, right_rows))
        together = _Together(
            _kept(select(targets, users)),
            _kept(select(grams, users)),
            select(left, lower),
            select(right, upper),
            [lower.index(left_rows[e]) for e in users],
            [upper.index(right_rows[e]) for e in users],
            forms,
            codec,
            turn,
        )
        made = together.quantized()
        lefts |= zip(lower, made[0])
        rights |= zip(upper, made[1])
    return [lefts[row] for row in range(len(left))], [rights[row] for row in range(len(right))]


def connected(left_rows: list[int], right_rows: list[int]) -> list[list[int]]:
    """Experts in sets that share no row with each other."""
    first = max(left_rows) + 1
    size = first + max(right_rows) + 1
    edges = coo_array((np.ones(len(left_rows)), (left_rows, [first + row for row in right_rows])), shape=(size, size))
    label = connected_components(edges, directed=False)[1]
    sets: dict[int, list[int]] = {}
    for expert, row in enumerate(left_rows):
        sets.setdefault(int(label[row]), []).append(expert)
    return list(sets.values())


def _kept(items: Sequence) -> Sequence:
    """A single one is asked for in every round and made once."""
    return list(items) if len(items) == 1 else items


class _Together(NamedTuple):
    """Factors that depend on each other through the rows that experts share."""

    targets: Sequence[torch.Tensor]
    grams: Sequence[torch.Tensor]
    left: Sequence[torch.Tensor]
    right: Sequence[torch.Tensor]
    left_rows: list[int]
    right_rows: list[int]
    forms: dict[str, Format]
    codec: Codecs
    turn: torch.Tensor

    def quantized(self) -> tuple[list[PackedMatrix], list[PackedMatrix]]:
        users = [[e for e, r in enumerate(self.right_rows) if r == row] for row in range(len(self.right))]

        def balanced(row: int) -> torch.Tensor:
            # Against a left factor that uses it, so that no direction drowns in the rotation.
            beside = self.left[self.left_rows[users[row][0]]]
            return self.turn.T @ balance(beside.double(), self.right[row].double())[1]

        def refitted(row: int) -> torch.Tensor:
            (expert,) = users[row]
            mine, held = self._opened(lefts, self.left_rows)[expert], self.codec.noise(self.forms["left"])
            return refit_right(self.targets[expert], mine, self._opened(rights, self.right_rows)[expert], held)

        def quantized_rights(wanted: Callable[[int], torch.Tensor]) -> list[PackedMatrix]:
            return [self.codec.pack(wanted(row), inputs[row], self.forms["right"]) for row in range(len(users))]

        def known(row: int):
            return self.codec.inputs(sum(self.grams[e] for e in users[row]), self.forms["right"])

        inputs = _kept(LazySequence(len(users), known))
        rights = quantized_rights(balanced)
        lefts = self._lefts(rights)
        if any(len(sharing) > 1 for sharing in users):
            return lefts, rights
        best = self._lost(lefts, rights)
        for _ in range(ROUNDS):
            new_rights = quantized_rights(refitted)
            new_lefts = self._lefts(new_rights)
            error = self._lost(new_lefts, new_rights)
            if error >= best:
                break
            lefts, rights, best = new_lefts, new_rights, error
        return lefts, rights

    def _opened(self, packed: list[PackedMatrix], rows: Sequence[int]) -> LazySequence:
        return LazySequence(len(rows), lambda at: packed[rows[at]].dense(torch.float32))

    def _lefts(self, rights: list[PackedMatrix]) -> list[PackedMatrix]:
        made = []
        for row in range(len(self.left)):
            users = [e for e, r in enumerate(self.left_rows) if r == row]
            grams, inputs = select(self.grams, users), self._opened(rights, [self.right_rows[e] for e in users])
            cross, bottleneck = left_sums(select(self.targets, users), grams, inputs)
            wanted = solved_left(cross, bottleneck)
            form = self.forms["left"]
            made.append(self.codec.pack(wanted, self.codec.inputs(bottleneck, form), form))
        return made

    def _lost(self, lefts: list[PackedMatrix], rights: list[PackedMatrix]) -> float:
        products = zip(self.targets, self._opened(lefts, self.left_rows), self._opened(rights, self.right_rows))
        return sum(energy(w - (u @ v).to(w), gram) for (w, u, v), gram in zip(products, self.grams))
