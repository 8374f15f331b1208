"""What the output of an MoE block loses when it has a part of its experts: routed anew, not forecast."""

import copy
from pathlib import Path

import torch
from torch import nn

from ..memory.limits import Batches
from ..model.experts import ROUTERS, expert_count, expert_output, gather, intermediate, route
from ..runtime.routers import regroup, router_of


class BlockWatch:
    """Keeps inputs and outputs of a block while its layer runs, of every `every`-th window (of at least one of each
    batch); then tells what is lost with fewer experts.

    Each expert's output for each token is computed once: a subset of experts costs a router and a sum.
    """

    def __init__(self, block: nn.Module, name: str, every: int, scratch: Path | None = None):
        """name: of the experts module in the block."""
        self.block, self.name, self.every = block, name, every
        self.experts = block.get_submodule(name)
        self.inputs, self.outputs, self.answers = (Batches(scratch) for _ in range(3))
        self._hook = block.register_forward_hook(self._hear, with_kwargs=True)

    def _hear(self, block: nn.Module, args: tuple, kwargs: dict, output) -> None:
        x = next(iter([*args, *kwargs.values()]))
        self.inputs.append(x[:: self.every].clone())
        self.outputs.append(_first(output)[:: self.every].clone())

    @torch.no_grad()
    def detach(self) -> None:
        """The layer is done: all experts answer for all tokens."""
        self._hook.remove()
        for x in self.inputs:
            flat = x.reshape(-1, x.shape[-1])
            each = range(expert_count(self.experts))
            self.answers.append(torch.stack([self._answer(expert, flat) for expert in each]))

    def _answer(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        return expert_output(self.experts, expert, intermediate(self.experts, expert, x))

    @torch.no_grad()
    def loss(self, kept: list[int]) -> float:
        """Sum over windows of the norm of what the block's output differs by when it has these experts alone."""
        experts, total = _Answers(self.experts, kept), 0.0
        block = self._copy(kept, experts)
        for x, wanted, experts.table in zip(self.inputs, self.outputs, self.answers):
            total += float((_first(block(x)) - wanted).double().flatten(1).norm(dim=1).sum())
        return total

    def _copy(self, kept: list[int], experts: nn.Module) -> nn.Module:
        """The block with a router for these experts; all other weights are shared."""
        block = copy.copy(self.block)
        block._modules = dict(block._modules) | {self.name: experts}
        for home in ROUTERS & block._modules.keys():
            block._modules[home] = copy.deepcopy(block._modules[home])
        router = router_of(block, expert_count(self.experts))
        assert router is not None  # plans have asked
        regroup(router, [[expert] for expert in kept])
        return block


class _Answers(nn.Module):
    """Stands in for some of the experts: looks their outputs up in `table` (E, tokens, H)."""

    table: torch.Tensor

    def __init__(self, native: nn.Module, kept: list[int]):
        super().__init__()
        self.native, self.kept = [native], torch.tensor(kept)  # in a list: no module of this one

    def forward(self, *inputs):
        routed = route(self.native[0], *inputs)
        return gather(self.native[0], self.table[self.kept[routed.expert.cpu()], routed.token], routed, *inputs)


def _first(output):
    return output[0] if isinstance(output, tuple) else output
