"""Own factors beside factors that all experts of a layer share: which mixture loses least for the same parameters.

python -m moesvd_quant.evaluation.benchmarks.mixtures --model FOLDER --calibration TEXTS [--samples 96] [--length 256]

The hidden side of all experts of a layer is one space, which gate and up read and down writes. Of a basis of `share` of
its dimensions, stored once, an expert may have full coefficients (shared), coefficients that are factors of its own
(nested), or full coefficients with factors of its own for what the basis leaves (added). All are fitted under each
expert's own metric, ranks by one threshold over the experts; errors of the best share as quotients of own factors'.
"""

from pathlib import Path
from statistics import geometric_mean
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import torch
import typer

from moesvd_quant.decompose.whitening import energy, gram_root, whitened_spectrum
from moesvd_quant.evaluation.table import Table as Shown
from moesvd_quant.evaluation.table import render
from moesvd_quant.model.experts import dense_weight, expert_count, find_experts
from moesvd_quant.model.named import resolve_model
from moesvd_quant.planning.context import expert_grams
from moesvd_quant.planning.knapsack import DENSE, NOTHING, Choice, Table, allocate
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.run.run import Run
from moesvd_quant.run.threads import sync_threads
from moesvd_quant.runtime.parts import JOINT

KEPT = (0.6, 0.4, 0.3, 0.2)
SHARES = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875)


def least_error(spectra: list[torch.Tensor], dense: int, rank: int, budget: float) -> float:
    """What truncation loses at best where a rank has `rank` parameters, a whole matrix `dense`; inf if too dear."""
    if budget <= 0:
        return float("inf")
    useful = range(1, min(len(spectra[0]), -(-dense // rank)))
    tails = torch.stack([s.sum() - s.cumsum(0) for s in spectra]).clamp(min=0).numpy()
    errors = [np.array([[float(s.sum())] for s in spectra]), tails[:, [r - 1 for r in useful]]]
    choices = [NOTHING, *map(Choice, useful), Choice(DENSE)]
    costs = np.array([0, *(r * rank for r in useful), dense], dtype=float)
    table = Table(choices, costs, np.hstack([*errors, np.zeros((len(spectra), 1))]))
    return allocate({"experts": table}, budget, distinct=len(choices)).error


def basis(weights: list[torch.Tensor], grams: list[torch.Tensor], reads: bool) -> torch.Tensor:
    """The directions (hidden, hidden) of the shared side in order of what they carry: rows that gate and up read by
    (under the mean metric), or columns that down writes."""
    if not reads:
        return torch.linalg.eigh(sum(w @ g @ w.T for w, g in zip(weights, grams)))[1].flip(1)
    root = gram_root(sum(grams) / len(grams))
    vectors = torch.linalg.eigh(root.T @ sum(w.T @ w for w in weights) @ root)[1].flip(1)
    return vectors.T @ torch.linalg.inv(root)


def mixtures(weights: list[torch.Tensor], grams: list[torch.Tensor], reads: bool) -> dict[tuple[str, float], float]:
    """{(mixture, kept share): error of the best share} of the matrices (out, in) of all experts, float64."""
    count, (out, columns) = len(weights), weights[0].shape
    hidden, inner = (columns, out) if reads else (out, columns)
    whole = count * out * columns
    spectra = [whitened_spectrum(w, g) for w, g in zip(weights, grams)]
    found = {("own", kept): [least_error(spectra, out * columns, out + columns, kept * whole)] for kept in KEPT}
    directions = basis(weights, grams, reads)
    for share in SHARES:
        size = round(share * hidden)
        beyond, nested, rest = 0.0, [], []
        for weight, gram in zip(weights, grams):
            if reads:
                right = directions[:size]
                inputs = right @ gram @ right.T
                coefficients = torch.linalg.solve(inputs, right @ gram @ weight.T).T
                left_over = weight - coefficients @ right
            else:
                left, inputs = directions[:, :size], gram
                coefficients = left.T @ weight
                left_over = weight - left @ coefficients
            beyond += energy(left_over, gram)
            nested.append(whitened_spectrum(coefficients, inputs))
            rest.append(whitened_spectrum(left_over, gram))
        for kept in KEPT:
            budget, dense = kept * whole - size * hidden, inner * size
            for name, error in (
                ("shared", least_error(nested, dense, dense, budget) + beyond),
                ("nested", least_error(nested, dense, inner + size, budget) + beyond),
                ("added", least_error(rest, out * columns, out + columns, budget - count * dense)),
            ):
                found.setdefault((name, kept), []).append(error)
    return {key: min(errors) for key, errors in found.items()}


def main(
    model: Annotated[str, typer.Option(help="Hugging Face folder, or `reference`.")] = "reference",
    calibration: Annotated[str, typer.Option(help="Calibration texts, joined by commas.")] = "demo",
    samples: int = 96,
    length: int = 256,
) -> None:
    sync_threads()
    given = [f"calibration.{k}={v}" for k, v in dict(dataset=calibration, samples=samples, length=length).items()]
    quotients: dict = {}
    with TemporaryDirectory() as folder:
        job = Run(load_recipe("svd", given), resolve_model(model), Path(folder) / "run", "cpu")
        for index, statistics in enumerate(job.statistics.layers()):
            layer = job.meta.load_layer(index)
            for path, experts in find_experts(layer):
                grams = expert_grams(statistics, path, "cpu")
                for name in (JOINT, "down"):
                    indices = range(expert_count(experts))
                    weights = [dense_weight(experts, name, e, torch.float64) for e in indices]
                    made = mixtures(weights, [grams[name][e].double() for e in indices], name == JOINT)
                    for (mixture, kept), error in made.items():
                        quotients.setdefault((name, kept), {}).setdefault(mixture, []).append(error / made["own", kept])
            job.meta.drop_layer(index)
    kinds = ["nested", "shared", "added"]
    rows = [
        [name, f"{kept:.0%}", *(f"{geometric_mean(q[k]):.2f} ({min(q[k]):.2f} to {max(q[k]):.2f})" for k in kinds)]
        for (name, kept), q in quotients.items()
    ]
    title = "Error of the best mixture, relative to own factors of as many parameters: mean of layers (from, to)"
    print(f"{title}\n\n{render(Shown(title, ['matrices', 'kept', *kinds], rows), 'markdown')}", end="")


if __name__ == "__main__":
    typer.run(main)
