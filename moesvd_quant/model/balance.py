"""Channels between up and down of one size: what a row of up has too much, and a column of down too little, is moved.

Where an expert computes down(act(gate x) * (up x)), row i of up times s and column i of down over s give the same.
Codes and factors lose about the same of every channel: one that is 32 times as large in up, and as much smaller in
down, would have the others drown in its error. Powers of two change no bit of what is computed.
"""

import torch
from torch import nn

from ..runtime.factorized_experts import FactorizedExperts
from .experts import activate, find_experts, flags_of, split_projections

LARGEST = 16  # binary places that a channel is moved by


def exponents_of(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Binary places (E, inner) float32 by which up's rows are raised and down's columns lowered, so that the norms of
    both are as near each other as in the median channel of their expert; 0 where either is zero.

    up (E, inner, hidden), down (E, hidden, inner).
    """
    apart = (down.float().norm(dim=1) / up.float().norm(dim=2)).log2() / 2
    known = apart.isfinite()
    apart = apart.where(known, torch.nan)
    moved = (apart - apart.nanmedian(dim=1, keepdim=True).values).round()
    return moved.nan_to_num(0.0).clamp(-LARGEST, LARGEST)


@torch.no_grad()
def move(experts: nn.Module, exponents: torch.Tensor) -> None:
    """Raises the rows of up of native experts, and lowers the columns of down, by binary places (E, inner)."""
    weights = split_projections(experts)
    weights["up"].mul_(torch.exp2(exponents).to(weights["up"])[:, :, None])
    weights["down"].mul_(torch.exp2(-exponents).to(weights["down"])[:, None, :])


def balance(layer: nn.Module) -> dict[str, torch.Tensor]:
    """Balances the native experts of a loaded layer: {path of each experts module: what its channels were moved by}.
    Those whose output is not linear in up's, such as clamped ones, and those with biases stay as they are."""
    moved = {}
    for path, experts in find_experts(layer):
        if isinstance(experts, FactorizedExperts) or not is_linear_in_up(experts):
            continue
        weights = split_projections(experts)
        exponents = exponents_of(weights["up"], weights["down"])
        if exponents.count_nonzero():
            move(experts, exponents)
            moved[path] = exponents
    return moved


def is_linear_in_up(experts: nn.Module) -> bool:
    """Whether twice the output of up gives twice the input of down: tried on values that a clamp would show at."""
    flags = flags_of(experts)
    if flags.has_bias or not flags.has_gate:
        return False
    gate = torch.linspace(-50, 50, 16).view(1, -1)
    once, twice = (activate(experts, {"gate": gate, "up": scale * gate.flip(1)}, 0) for scale in (1, 2))
    return torch.equal(twice, 2 * once)
