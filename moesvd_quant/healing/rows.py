"""Rows of trained matrices that become zero while these are trained: LoSparse's pruning, as a callback of Trainer."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback

from ..decompose.losparse import kept_rows, kept_share
from ..memory.files import write_tensors

MEMORY = 0.85  # beta of the paper: how much of a row's importance is that of earlier steps
IMPORTANCE = "importance.safetensors"  # in a trainer's checkpoint


class RowPruning(TrainerCallback):
    """Zeroes the rows of `banks` {name: parameter (matrices, rows, columns)} that matter least, of all together.

    A weight matters as much as |w dL/dw| (after the gradient is clipped), a row as the mean of its weights, smoothed
    over steps. Up to step `first` all rows stay, after step `done` the share `final` of the weights, between them what
    `kept_share` says. A row that is zero may come back where its gradient is large.
    """

    def __init__(self, banks: dict[str, nn.Parameter], first: int, done: int, final: float):
        self.banks, self.first, self.done, self.final = banks, first, done, final
        self.importance = {name: torch.zeros(bank.shape[:-1], device=bank.device) for name, bank in banks.items()}

    def on_train_begin(self, args, state, control, **_):
        if state.global_step:
            stored = load_file(Path(args.output_dir) / f"checkpoint-{state.global_step}" / IMPORTANCE)
            for name, value in self.importance.items():
                value.copy_(stored[name])

    @torch.no_grad()
    def on_pre_optimizer_step(self, args, state, control, **_):
        for name, bank in self.banks.items():
            self.importance[name].lerp_((bank * bank.grad).abs().mean(-1), 1 - MEMORY)

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, **_):
        share = kept_share(state.global_step + 1, self.first, self.done, self.final)
        if share < 1:
            columns = [bank.shape[-1] for bank in self.banks.values()]
            for bank, kept in zip(self.banks.values(), kept_rows([*self.importance.values()], columns, share)):
                bank.mul_(kept.unsqueeze(-1))

    def on_save(self, args, state, control, **_):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        write_tensors(folder / IMPORTANCE, {name: value.cpu() for name, value in self.importance.items()})
