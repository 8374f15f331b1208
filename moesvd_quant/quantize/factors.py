"""Quantizing factors together: rotate the bottleneck, quantize the right one, refit the left one to it."""

import torch

from ..decompose.whitening import balance, refit_left
from .gptq import PackedMatrix


def rotation(rank: int, seed: int) -> torch.Tensor:
    """A random orthogonal (rank, rank) float64: spreads a bottleneck's outliers over all its directions."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def quantize_factors(
    targets: list[torch.Tensor],
    grams: list[torch.Tensor],
    left: torch.Tensor,
    right: torch.Tensor,
    left_rows: list[int],
    right_rows: list[int],
    quant: dict,
    quantizer,
    seed: int,
) -> tuple[list[PackedMatrix], list[PackedMatrix]]:
    """Packs the banks left (n_left, out, r) and right (n_right, r, in) of the experts that use them.

    targets: the weights (out, in) the products stand for; grams (in, in) of their inputs; rows: bank row of
    each expert; quant: {"left", "right"}; quantizer(matrix, gram, quant) -> PackedMatrix.

    The product is free up to left T, T^-1 right: directions are balanced and the bottleneck rotated, which
    costs nothing at run time. A right row is quantized for the summed inputs of its experts; a left row is
    refitted in closed form to the *quantized* right ones and quantized for what they put out.
    """
    turn = rotation(right.shape[1], seed).to(right.device)
    grams = [g.double() for g in grams]
    rights = []
    for row in range(len(right)):
        users = [e for e, r in enumerate(right_rows) if r == row]
        # Balanced against a left factor that uses it, so that no direction drowns in the rotation.
        _, scaled = balance(left[left_rows[users[0]]].double(), right[row].double())
        rights.append(quantizer(turn.T @ scaled, sum(grams[e] for e in users), quant["right"]))
    lefts = []
    for row in range(len(left)):
        users = [e for e, r in enumerate(left_rows) if r == row]
        inputs = [rights[right_rows[e]].dense().to(right.device) for e in users]
        refitted = refit_left([targets[e] for e in users], [grams[e] for e in users], inputs)
        bottleneck = sum(v @ grams[e] @ v.T for e, v in zip(users, inputs))
        lefts.append(quantizer(refitted, bottleneck, quant["left"]))
    return lefts, rights
