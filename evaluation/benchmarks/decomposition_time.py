"""What is claimed of the time that a whitened decomposition takes."""

import time
from statistics import median

import torch

from moesvd_quant.decompose.whitening import balance, gram_root, whitened_directions
from moesvd_quant.evaluation.benchmarks.bars import Bar


def decomposition_bars(inner: int = 3584, hidden: int = 1024, repeats: int = 5, device: str = "cpu") -> list[Bar]:
    """Time of all whitened singular values and the factors of a third of the rank, relative to torch.linalg.svd of the
    whitened matrix in double and in single precision (its root of the Gram matrix not counted), at Mixtral's shapes
    reduced to a quarter; of one matrix, and of an expert, whose gate and up are one for us.

    RuntimeError where singular values differ by more than 1 %.
    """
    limit, bars = 1 / 10 if device.startswith("cuda") else 1 / 3, []
    down, gate, gate_up = (hidden, inner), (inner, hidden), (2 * inner, hidden)
    mine, theirs = _decomposition_times((down, gate, gate_up), repeats, device)
    for dtype in (torch.float64, torch.float32):
        ours = [mine[down], mine[gate], mine[gate_up] + mine[down]]
        svd = [theirs[down, dtype], theirs[gate, dtype], 2 * theirs[gate, dtype] + theirs[down, dtype]]
        for what, time_of, base in zip((f"{hidden} x {inner}", f"{inner} x {hidden}", "an expert"), ours, svd):
            claim = f"time to decompose {what} against torch.linalg.svd in {str(dtype)[6:]}"
            bars.append(Bar(claim, time_of / base, limit))
    return bars


def _decomposition_times(shapes, repeats: int, device: str) -> tuple[dict, dict]:
    """Seconds, median of `repeats`, by shape, and of torch.linalg.svd by (shape, precision)."""
    generator = torch.Generator().manual_seed(0)
    mine: dict = {shape: [] for shape in shapes}
    theirs: dict = {(shape, dtype): [] for shape in shapes for dtype in (torch.float64, torch.float32)}
    for out, in_features in shapes:
        weight = torch.randn(out, in_features, generator=generator).to(device)
        inputs = torch.randn(2 * in_features, in_features, generator=generator) * torch.rand(in_features)
        gram = (inputs.T @ inputs).to(device)
        whitened = weight.double() @ gram_root(gram)
        for _ in range(repeats):
            started = _now(device)
            spectrum, *factors = whitened_directions(weight, gram, min(out, in_features) // 3)
            balance(*factors)
            mine[out, in_features].append(_now(device) - started)
            for dtype in (torch.float64, torch.float32):
                given, started = whitened.to(dtype), _now(device)
                values = torch.linalg.svd(given, full_matrices=False)[1].double()
                theirs[(out, in_features), dtype].append(_now(device) - started)
        if not torch.allclose(spectrum.sqrt(), values, rtol=0.01, atol=0.01 * float(values.max())):
            raise RuntimeError(f"{out} x {in_features}: singular values differ by more than 1 %; this is a defect")
    return {key: median(times) for key, times in mine.items()}, {key: median(times) for key, times in theirs.items()}


def _now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()
