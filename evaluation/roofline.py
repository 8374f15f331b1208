"""What a machine would allow at most: its measured rates, and the bytes that a model has to read."""

import time
from collections.abc import Callable

import torch
from torch import nn

from ..model.experts import expert_count, find_experts
from .memory import resident_bytes


def machine_peaks(device: torch.device, dtype: torch.dtype) -> dict:
    """{"flops": per second of a large matrix product in dtype, laid out as that of a linear, "bandwidth": bytes per
    second read from memory}: the best of several, measured here and now."""
    size = 4096 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    big = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)  # float32, beyond any cache

    def best(run: Callable, repeats: int = 8) -> float:
        found = []
        for _ in range(repeats):
            start = synchronized_time(device)
            run()
            found.append(synchronized_time(device) - start)
        return min(found)

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {
        "device": name,
        "dtype": str(dtype),
        "flops": 2 * size**3 / best(lambda: a @ b.T),
        "bandwidth": big.numel() * 4 / best(lambda: big.sum()),
    }


def bytes_touched(model: nn.Module, tokens: int) -> dict[str, float]:
    """Bytes of weights that a forward pass over so many tokens reads: all but the experts that nobody was routed to
    (in expectation, by a router that balances) and the rows of embeddings that are not looked up."""
    top_k, experts_size, touched = getattr(model.config, "num_experts_per_tok", 0), 0, 0.0
    for _, experts in find_experts(model):
        size, count = resident_bytes(experts), expert_count(experts)
        experts_size += size
        touched += size * (1 - (1 - top_k / count) ** tokens)
    embeddings = model.get_input_embeddings().weight
    tied = embeddings is getattr(model.get_output_embeddings(), "weight", None)
    rest = resident_bytes(model) - experts_size - (0 if tied else embeddings.numel() * embeddings.element_size())
    return {"experts": touched, "total": touched + rest}


def synchronized_time(device: torch.device) -> float:
    """Seconds, after all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
