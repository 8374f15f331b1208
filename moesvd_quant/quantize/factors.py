"""Quantizing factors together: rotate the bottleneck, quantize the right one, refit the left one to it, and in turn."""

from collections.abc import Callable, Sequence

import torch

from ..decompose.whitening import balance, energy, refit_left, refit_right
from ..lazy import Lazily, picked
from .gptq import PackedMatrix
from .noise import ROUNDING

# How often both factors are fitted anew, each to the quantized other: 2 take a fifth off the error that quantization
# adds, 6 not quite a third (docs/results.md).
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
    quant: dict,
    quantizer,
    seed: int,
) -> tuple[list[PackedMatrix], list[PackedMatrix]]:
    """Packs the banks left n_left x (out, r) and right n_right x (r, in) of the experts that use them.

    targets: the weights (out, in) the products stand for; grams (in, in) of their inputs; rows: bank row of
    each expert; quant: {"left", "right"}; quantizer(matrix, gram, quant) -> PackedMatrix. All may be made on demand:
    no more is asked for at a time than one product needs.

    The product is free up to left T, T^-1 right: directions are balanced and the bottleneck rotated, which
    costs nothing at run time. A right row is quantized for the summed inputs of its experts; a left row is
    refitted in closed form to the *quantized* right ones and quantized for what they put out. Right rows of one
    expert each are then refitted to the quantized left ones, and so on, while that lowers the error, ROUNDS times.
    """
    turn = rotation(len(right[0]), seed).to(right[0].device)
    right_users = [[e for e, r in enumerate(right_rows) if r == row] for row in range(len(right))]

    def opened(packed: list[PackedMatrix], rows: Sequence[int]) -> Lazily:
        return Lazily(len(rows), lambda at: packed[rows[at]].dense().to(turn))

    def balanced(row: int) -> torch.Tensor:
        # Against a left factor that uses it, so that no direction drowns in the rotation.
        return turn.T @ balance(left[left_rows[right_users[row][0]]].double(), right[row].double())[1]

    def refitted(row: int) -> torch.Tensor:
        (expert,) = right_users[row]
        mine, held = opened(lefts, left_rows)[expert], ROUNDING[quant["left"]["bits"]]
        return refit_right(targets[expert], mine, opened(rights, right_rows)[expert], held)

    def quantized_rights(wanted: Callable[[int], torch.Tensor]) -> list[PackedMatrix]:
        inputs = (sum(grams[e].double() for e in users) for users in right_users)
        return [quantizer(wanted(row), gram, quant["right"]) for row, gram in enumerate(inputs)]

    def quantized_lefts(rights: list[PackedMatrix]) -> list[PackedMatrix]:
        made = []
        for row in range(len(left)):
            users = [e for e, r in enumerate(left_rows) if r == row]
            own, inputs = picked(grams, users), opened(rights, [right_rows[e] for e in users])
            bottleneck = sum(v @ g.double() @ v.T for g, v in zip(own, inputs))
            made.append(quantizer(refit_left(picked(targets, users), own, inputs), bottleneck, quant["left"]))
        return made

    def lost(lefts: list[PackedMatrix], rights: list[PackedMatrix]) -> float:
        products = zip(targets, opened(lefts, left_rows), opened(rights, right_rows), grams)
        return sum(energy(target - (u @ v).to(target), gram) for target, u, v, gram in products)

    rights = quantized_rights(balanced)
    lefts = quantized_lefts(rights)
    if any(len(users) > 1 for users in right_users):
        return lefts, rights
    best = lost(lefts, rights)
    for _ in range(ROUNDS):
        new_rights = quantized_rights(refitted)
        new_lefts = quantized_lefts(new_rights)
        error = lost(new_lefts, new_rights)
        if error >= best:
            break
        lefts, rights, best = new_lefts, new_rights, error
    return lefts, rights
