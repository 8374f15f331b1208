"""Which expert layers of a model bear decomposition (MoE-SVD, section 3.2 and appendix D.1)."""

import torch


def sampling_frequency(tokens: torch.Tensor, total_tokens: int) -> torch.Tensor:
    """f_i of eq. 9 (E,) float64: share of all tokens whose top-k holds expert i."""
    return tokens.double() / total_tokens


def principal_rank(weight: torch.Tensor, threshold: float) -> int:
    """p_i of eq. 4: singular values of weight (out, in) above `threshold` times the largest (Algorithm 1)."""
    values = torch.linalg.svdvals(weight.double())
    return int((values > threshold * values[0]).sum())


def layer_sensitivity(frequency: torch.Tensor, rank: torch.Tensor, outliers: torch.Tensor) -> float:
    """S_L of eq. 4: sum over experts of f_i p_i a_i; each argument (E,)."""
    return float((frequency * rank * outliers).sum())


def select_layers(sensitivity: list[float], ratio: float, halved: float) -> list[int]:
    """The least sensitive layers, as few as reach `ratio`, in ascending order of index.

    halved: what a decomposed layer keeps of its parameters at half its full rank. The papers fix no rank;
    half of it is the point from which the number of layers is counted, the rank then solves the rest.
    """
    layers = len(sensitivity)
    wanted = next((n for n in range(1, layers + 1) if n * (1 - halved) >= ratio * layers), layers)
    order = sorted(range(layers), key=lambda i: (sensitivity[i], i))
    return sorted(order[:wanted])
