"""Rank and bits of every expert under one budget of bytes: tables of exact costs and forecast errors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..calibration.effect import perturbed
from ..decompose.whitening import energy, whitened_directions
from ..quantize.codec import Bank
from ..quantize.feedback import conditional_variance
from ..quantize.noise import dense_noise, factor_noise
from ..runtime.formats import Format
from .knapsack import DENSE, FLOAT, NOTHING, Choice, Storage, Table, useful_ranks

# Measured at one size of error, effects are trusted to this power (docs/results/calibration.md has the ablation).
SENSITIVITY_POWER, LEAST_SENSITIVITY = 0.7, 1e-7

# The format of a bank: (how it is to be stored, its columns, what it is) -> Format.
FormatOf = Callable[[Storage, int, Bank], Format]


def settings() -> dict[str, float]:
    """What prices depend on beside effects."""
    return {"power": SENSITIVITY_POWER, "least effect": LEAST_SENSITIVITY}


@dataclass(frozen=True)
class Profile:
    """What the forecast needs of one matrix; see `quantize.noise`. Errors are in the unit of `error_price`."""

    spectrum: torch.Tensor  # (k,) squared whitened singular values, largest first
    dense: float  # error of the whole matrix per unit of rounding error
    factors: torch.Tensor  # (k,) error of the factors of each rank per unit of rounding error


def profile(weight: torch.Tensor, gram: torch.Tensor, damp: float) -> Profile:
    """Of a matrix (out, in), each row times the root of its price, whose inputs have Gram matrix gram (in, in)."""
    spectrum, _, rows = whitened_directions(weight, gram, min(weight.shape))
    columns, spread = weight.shape[1], float(conditional_variance(gram, damp).sum())
    return Profile(
        spectrum.cpu(),
        dense_noise(float(weight.double().square().sum()), columns, spread),
        factor_noise(spectrum, rows.double().norm(dim=1), columns, spread, damp).cpu(),
    )


def fit_table(
    profiles: list[Profile],
    shape: tuple[int, int],
    storages: list[Storage],
    form: FormatOf,
    noise: Callable[[Format], float],
    dtype: torch.dtype,
    ranks: bool,
) -> Table:
    """Choices of rank (where `ranks`) and storage of the experts of a projection with matrices (out, in).

    Costs are exact bytes; errors are what truncation and rounding are forecast to lose. noise: rounding error of a
    format, per unit of variance. FLOAT stands for `dtype`.
    """
    out, in_features = shape
    choices, costs, errors = [NOTHING], [0], [[float(p.spectrum.sum()) for p in profiles]]
    for storage in storages:
        whole, factor = form(storage, in_features, "dense"), form(storage, in_features, "right")
        rounding, of_factors = noise(whole), noise(factor)
        choices.append(Choice(DENSE, storage))
        costs.append(whole.bank_bytes(shape, dtype))
        errors.append([rounding * p.dense for p in profiles])
        for rank in useful_ranks(shape) if ranks else ():
            choices.append(Choice(rank, storage))
            right = factor.bank_bytes((rank, in_features), dtype)
            costs.append(right + form(storage, rank, "left").bank_bytes((out, rank), dtype))
            lost = [float(p.spectrum[rank:].sum() + of_factors * p.factors[rank - 1]) for p in profiles]
            errors.append(lost)
    return Table(choices, np.array(costs, dtype=float), np.array(errors).T)


def error_price(weights: torch.Tensor, grams: Sequence[torch.Tensor], effect: float) -> float:
    """What a unit of error energy, tr(E G E^T), of this group costs: the divergence that rounding it caused, per
    relative error that the rounding made under the metric, to SENSITIVITY_POWER, spread over the group's energy.

    weights (experts, out, in), grams (in, in) by expert; effect: nats per token, of `measure_effects`.
    """
    error = whole = 0.0
    for weight, gram in zip(weights, grams):
        error += energy(weight.float() - perturbed(weight).float(), gram)
        whole += energy(weight, gram)
    if whole == 0:
        return 0.0
    relative = whole / error if error > 0 else 1.0
    return max(effect, LEAST_SENSITIVITY) ** SENSITIVITY_POWER * relative**SENSITIVITY_POWER / whole


def describe(choice: Choice) -> str:
    """A choice in words: `rank 64 in 3 bit`."""
    if choice.rank == 0:
        return "nothing"
    kind = "dense" if choice.rank == DENSE else f"rank {choice.rank}"
    return kind if choice.storage == FLOAT else f"{kind} in {choice.storage}"
