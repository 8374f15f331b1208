"""Experts over several processes: each has a share of the intermediate channels of every expert.

As in MoE-SVD, appendix B.4: the left factors of gate and up are split by rows and the right factor of down by columns,
all others are in every process. What comes from down is then a share of the sum, which vLLM adds up over processes.
"""

import torch
from torch import nn

from ...errors import ModelError
from ...runtime.factorized_experts import FactorizedExperts
from ...runtime.parts import JOINT, DensePart, Layout, Part


def require_splittable(folder, layout: Layout, processes: int) -> None:
    """ModelError where the weights of a checkpoint cannot be split over processes."""
    parts = layout.parts()
    if processes > 1 and (layout.packed or any(part.rows or part.columns for part in parts)):
        what = "packed" if layout.packed else "pruned by channels (d2)"
        raise ModelError(
            f"{folder}: --tensor-parallel-size {processes}: weights that are {what} cannot be split over processes; "
            "serve it by one process (it is small), or split a checkpoint whose factors are in floating point"
        )


def split_experts(experts: FactorizedExperts, rank: int, processes: int) -> None:
    """Leaves a module of loaded float banks the share of process `rank`. ModelError where channels do not come out, or
    experts have biases, which every process would add."""
    channels = experts.shapes["down"][1]
    if channels % processes or experts.flags.has_bias:
        raise ModelError(f"{processes} processes cannot share experts of {channels} channels, or ones with biases")
    for projection, parts in experts.layout.items():
        for i, part in enumerate(parts):
            name = f"{projection}_{i}_{split_bank(projection, part)}"
            share = share_of(getattr(experts, name).data, projection, rank, processes)
            setattr(experts, name, nn.Parameter(share, requires_grad=False))
            experts.bank_shapes[name] = share.shape[-2], share.shape[-1]
    experts.shapes = {
        name: (out, inputs // processes) if name == "down" else (out // processes, inputs)
        for name, (out, inputs) in experts.shapes.items()
    }


def split_bank(projection: str, part: Part) -> str:
    """The bank of a part that meets the intermediate channels."""
    if isinstance(part, DensePart):
        return "dense"
    return "right" if projection == "down" else "left"


def share_of(bank: torch.Tensor, projection: str, rank: int, processes: int) -> torch.Tensor:
    """Share of a bank (matrices, rows, columns): columns of down, rows of others; of gate and up joined, of each."""
    if projection == "down":
        return bank.chunk(processes, 2)[rank].contiguous()
    halves = bank.chunk(2, 1) if projection == JOINT else (bank,)
    return torch.cat([half.chunk(processes, 1)[rank] for half in halves], 1)
