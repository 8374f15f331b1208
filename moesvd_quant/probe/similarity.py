"""How much experts have in common: effective ranks and similarities, beside those of random matrices."""

import torch


def effective_rank(values: torch.Tensor) -> float:
    """exp of the entropy of the shares of singular values (k,): 1..k (Roy and Vetterli 2007), 0 of a zero matrix."""
    shares = values.double() / values.double().sum().clamp(min=1e-300)
    return float(torch.special.entr(shares).sum().exp()) if float(values.sum()) > 0 else 0.0


def random_like(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """A matrix (out, in) of independent normal numbers, float32."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """Centered kernel alignment of x (n, p) and y (n, q), rows as examples (Kornblith et al. 2019, eq. 4), in 0..1."""
    x, y = (m.double() - m.double().mean(0) for m in (x, y))
    both = (x.T @ y).square().sum()
    own = (x.T @ x).norm() * (y.T @ y).norm()
    return float(both / own) if float(own) > 0 else 0.0


def mean_cka(matrices: list[torch.Tensor]) -> float:
    """Mean of `linear_cka` over all pairs of at least two matrices with equal numbers of rows."""
    pairs = [linear_cka(a, b) for i, a in enumerate(matrices) for b in matrices[i + 1 :]]
    return sum(pairs) / len(pairs)


def expert_similarity(weights: torch.Tensor, rank: int) -> dict[str, float]:
    """{"W", "U", "V"}: mean CKA between the experts' weights (E, out, in), their U (out, rank) and V (in, rank) of the
    truncated SVD (MoE-SVD, figure 1 right; Table C of its review). U and V have singular directions as columns."""
    u, _, vh = torch.linalg.svd(weights.double(), full_matrices=False)
    parts = {"W": weights, "U": u[..., :rank], "V": vh[:, :rank].mT}
    return {name: mean_cka(list(part)) for name, part in parts.items()}


def spectra(weights: torch.Tensor) -> torch.Tensor:
    """Singular values (E, k) float64 of weights (E, out, in), largest first."""
    return torch.linalg.svdvals(weights.double())


def deltas(weights: torch.Tensor) -> torch.Tensor:
    """Weights (E, out, in) without their mean over experts: what a shared base leaves."""
    return weights.double() - weights.double().mean(0)
