"""Quantizing factors together: rotate the bottleneck, quantize the right one, refit the left one to it."""

from collections.abc import Sequence

import torch

from ..decompose.whitening import balance, refit_left
from ..lazy import Lazily, picked
from .gptq import PackedMatrix


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
    refitted in closed form to the *quantized* right ones and quantized for what they put out.
    """
    first = right[0]
    turn = rotation(len(first), seed).to(first.device)
    rights = []
    for row in range(len(right)):
        users = [e for e, r in enumerate(right_rows) if r == row]
        # Balanced against a left factor that uses it, so that no direction drowns in the rotation.
        _, scaled = balance(left[left_rows[users[0]]].double(), right[row].double())
        rights.append(quantizer(turn.T @ scaled, sum(grams[e].double() for e in users), quant["right"]))
    lefts = []
    quantized = Lazily(len(rights), lambda row: rights[row].dense().to(first.device))
    for row in range(len(left)):
        users = [e for e, r in enumerate(left_rows) if r == row]
        own, inputs = picked(grams, users), picked(quantized, [right_rows[e] for e in users])
        refitted = refit_left(picked(targets, users), own, inputs)
        bottleneck = sum(v @ g.double() @ v.T for g, v in zip(own, inputs))
        lefts.append(quantizer(refitted, bottleneck, quant["left"]))
    return lefts, rights
