"""How much log-perplexity truncation will cost, before anything is compressed.

Rounding each group of experts (a projection of a layer) to 3 bits has a measured effect on the model's predictions
(`calibration.effect`), and a known error on the inputs that the experts get. Small errors cost in proportion to their
energy, and groups add up: what truncation to the planned ranks loses on the same inputs is priced by that.
"""

import torch

from ..allocate import DENSE
from ..calibration.effect import perturbed
from ..decompose.whitening import output_basis


def output_energy(delta: torch.Tensor, gram: torch.Tensor) -> float:
    """tr(delta G delta^T): what an error (out, in) does to the outputs, over inputs with the sums gram (in, in)."""
    return float(((delta.double() @ gram.double()) * delta.double()).sum())


def rounding_energy(weight: torch.Tensor, gram: torch.Tensor) -> float:
    """Energy of the error that `measure_effects` made in a weight (out, in), on the inputs of gram (in, in)."""
    return output_energy(weight.double() - perturbed(weight).double(), gram)


def kept_energy(weight: torch.Tensor, metric: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """(k + 1,) float64: output energy on inputs with `gram` (in, in) that the best factors under `metric` (in, in) of
    rank 0..k keep of a weight (out, in), k = min(out, in); at rank r that is tr(P W G W^T), P = U_r U_r^T."""
    basis = output_basis(weight, metric, min(weight.shape))
    projected = basis.T @ weight.double()
    each = ((projected @ gram.double()) * projected).sum(1)
    return torch.cat([each.new_zeros(1), each.cumsum(0)])


def lost_energy(kept: list[torch.Tensor], totals: list[float], ranks: list[int]) -> float:
    """Energy that truncation to `ranks` loses in a group, from `kept_energy` and the whole energy of each expert."""
    return sum(0.0 if rank == DENSE else total - float(k[rank]) for k, total, rank in zip(kept, totals, ranks))


def log_perplexity(lost: dict, rounded: dict, effects: dict) -> float:
    """Forecast increase in nats per token: effects are priced per unit of energy; all by (path, projection)."""
    return sum(effects[key] * lost[key] / rounded[key] for key in lost if rounded[key] > 0)
