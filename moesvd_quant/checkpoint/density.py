"""Stored bits per original weight of every expert."""

import numpy as np
import torch

from ..model.experts import all_shapes, expert_count, find_experts, is_shared
from ..model.stream import StreamedModel
from ..runtime.parts import JOINT, Layout, Part
from ..runtime.routers import Sources
from .accounting import original_model

PLAIN = {16: torch.bfloat16, 32: torch.float32}  # a dtype of so many bits


def expert_bits(
    parts: list[Part], shape: tuple[int, int], experts: int, bits: int, sources: Sources | None = None
) -> np.ndarray:
    """(experts,) stored bits per original weight of a projection; a shared bank is shared out among its users, and what
    stands for several original experts among these. bits: of an original weight."""
    total = np.zeros(experts)
    sources = sources or [[expert] for expert in range(experts)]
    for part in parts:
        for bank in part.banks(*shape).values():
            stored = 8 * bank.form.bank_bytes(bank.shape[1:], PLAIN[bits])
            for expert, row in zip(part.experts, bank.rows):
                share = stored / bank.rows.count(row) / len(sources[expert])
                for original in sources[expert]:
                    total[original] += share
    return total / (shape[0] * shape[1])


def density(parent: StreamedModel, layout: Layout) -> dict[str, list[float]]:
    """{path of a module of routed experts: bits per original weight of each expert}, over its projections, when the
    checkpoint is as the layout says. Modules that it does not name have the bits of the original."""
    bits = 8 * parent.stored_dtype.itemsize
    found: dict[str, list[float]] = {}
    for path, experts in find_experts(original_model(parent)):
        if is_shared(experts):
            continue
        count, shapes = expert_count(experts), all_shapes(experts)
        projections = layout.experts.get(path, {})
        total, weights = np.zeros(count), 0
        for name in projections:
            size = shapes[name][0] * shapes[name][1]
            sources = layout.sources.get(path)
            total += size * expert_bits(projections[name], shapes[name], count, bits, sources)
            weights += size
        left = sum(out * columns for name, (out, columns) in shapes.items() if name != JOINT) - weights
        found[path] = ((total + left * bits) / (weights + left)).tolist()
    return found
