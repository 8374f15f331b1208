"""What routers say of the tokens that pass a layer, and what its experts would make of a sample of these."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ..memory.limits import Batches
from ..model.experts import expert_count, expert_output, intermediate, shapes_of
from ..runtime.routers import router_of, rows_of


def scorer_of(block: nn.Module, experts: nn.Module) -> nn.Module | None:
    """The module of a router whose weight (E, H) gives the logits; None where the router is not understood."""
    count, (hidden, _) = expert_count(experts), shapes_of(experts)["down"]
    router = router_of(block, count)
    for module in router.modules if router else ():
        weight = rows_of(module, count).get("weight")
        if weight is not None and weight.shape == (count, hidden):
            return module
    return None


class RouterWatch:
    """Hears what a router is asked, while the layer runs.

    gram (E, E) float64: sums over tokens of the products of the router's logits. Of every `every`-th token as well
    `hidden` (n, H) and its `logits` (n, E), a tensor per batch.
    """

    def __init__(self, block: nn.Module, experts: nn.Module, every: int | None = None, scratch: Path | None = None):
        scorer = scorer_of(block, experts)
        assert scorer is not None  # plans have asked
        self.experts, self.count, self.every = experts, expert_count(experts), every
        self.gram = torch.zeros(self.count, self.count, dtype=torch.float64)
        self.hidden, self.logits = Batches(scratch), Batches(scratch)
        self._hook = scorer.register_forward_pre_hook(self._hear)

    def detach(self) -> None:
        self._hook.remove()

    @torch.no_grad()
    def _hear(self, scorer: nn.Module, inputs: tuple) -> None:
        x = inputs[0].reshape(-1, inputs[0].shape[-1])
        bias = getattr(scorer, "bias", None)
        logits = F.linear(x.float(), scorer.weight.float(), None if bias is None else bias.float())
        self.gram += (logits.T.double() @ logits.double()).cpu()
        if self.every:
            self.hidden.append(x[:: self.every].clone())
            self.logits.append(logits[:: self.every].clone())

    @torch.no_grad()
    def gated_outputs(self) -> torch.Tensor:
        """(E, H) float64: the mean over the sample of each expert's output times the softmax of its logit, whether the
        token is sent to it or not."""
        hidden, _ = shapes_of(self.experts)["down"]
        total, tokens = torch.zeros(self.count, hidden, dtype=torch.float64), 0
        for x, logits in zip(self.hidden, self.logits):
            gates = logits.softmax(-1)
            for expert in range(self.count):
                out = expert_output(self.experts, expert, intermediate(self.experts, expert, x))
                total[expert] += (gates[:, expert].to(out) @ out).double().cpu()
            tokens += len(x)
        return total / tokens

    @torch.no_grad()
    def products(self, first: int, second: int) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Of the activations (inputs of down) of two experts on the sample: sums of their products (I, I), and of the
        squares of each (I,), float32."""
        cross, one, two = 0.0, 0.0, 0.0
        for x in self.hidden:
            a, b = (intermediate(self.experts, expert, x).float() for expert in (first, second))
            cross, one, two = cross + a.T @ b, one + a.square().sum(0), two + b.square().sum(0)
        return cross, (one, two)
