"""What a decoder layer sees: routing counts, Gram matrices and activation magnitudes, per expert.

All are sums over the calibration tokens in a fixed batch order, in float32.
"""

import types
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from ..memory.limits import Batches
from ..model.experts import (
    expert_count,
    expert_output,
    find_experts,
    find_linears,
    gather,
    intermediate,
    pairs_of,
    route,
    shapes_of,
)
from ..model.folder import ModelError
from ..runtime.native_call import Routed

# Magnitudes of activations are counted in bins of 1/16 octave, so that the outlier share of any threshold
# can be read later without a second walk.
LOWEST_OCTAVE, OCTAVES, BINS_PER_OCTAVE = -40, 60, 16
# Sums over an expert's tokens: the router's weight, the norm of the expert's output, and their product.
OUTPUTS = ("router_weight", "output_norm", "weighted_norm")
PART = 256  # tokens whose magnitudes are counted at a time


class LayerRecorder:
    """Attaches to a decoder layer, sums its statistics while batches pass, and detaches.

    sums: {path/gram (in, in), path/tokens ()} for each linear outside the experts. Linears that read the same tensor
    (q, k, v) share one Gram matrix: `aliases` names the one that holds it. Of each experts module in `experts`, an
    `ExpertsRecorder` keeps account.
    """

    def __init__(self, layer: nn.Module, at_once: int | None = None, scratch: Path | None = None):
        """at_once: experts of a module whose Gram matrices are in memory at a time; None for all, 0 to sum nothing and
        compute in the same way. scratch: folder for the inputs of the others, needed where `at_once` is given."""
        self.sums: dict[str, torch.Tensor] = {}
        self.aliases: dict[str, str] = {}
        self._last: tuple[str, torch.Tensor] | None = None
        self._hooks = []
        self.experts = {path: ExpertsRecorder(path, module, at_once, scratch) for path, module in find_experts(layer)}
        for path, module in find_linears(layer) if at_once != 0 else ():
            hook = module.register_forward_pre_hook(lambda _, args, path=path: self._linear(path, args[0]))
            self._hooks.append(hook)

    def detach(self) -> None:
        """Removes all hooks; the experts recorders can go on."""
        for hook in self._hooks:
            hook.remove()
        self._last = None
        for recorder in self.experts.values():
            recorder.detach()

    def _linear(self, path: str, x: torch.Tensor) -> None:
        if path in self.aliases:
            return
        if self._last is not None and self._last[1] is x and path + "/gram" not in self.sums:
            self.aliases[path] = self._last[0]
            return
        self._last = (path, x)
        flat = x.reshape(-1, x.shape[-1]).float()
        if path + "/gram" not in self.sums:
            self.sums[path + "/gram"] = flat.new_zeros(flat.shape[1], flat.shape[1])
            self.sums[path + "/tokens"] = torch.tensor(0)
        self.sums[path + "/gram"].addmm_(flat.T, flat)
        self.sums[path + "/tokens"] += len(flat)


class ExpertsRecorder:
    """Runs an experts module in place of its own forward and sums what each expert sees.

    Where Gram matrices of all experts do not fit in memory, those of the first ones are summed while batches pass, and
    the inputs are kept on disk: `groups` sums the others from them, a group at a time. The sums are the same bits.
    """

    def __init__(self, path: str, module: nn.Module, at_once: int | None, scratch: Path | None):
        if "channel_prior" in module._parameters:
            raise ModelError(
                f"{path}: each token chooses channels of the base (d2.dynamic): what its experts see cannot be "
                "recorded; run all stages in one recipe on the original model"
            )
        self.module, self.count = module, expert_count(module)
        self.hidden, self.inner = shapes_of(module)["down"]
        self.at_once = self.count if at_once is None else min(at_once, self.count)
        self.device = next(module.parameters()).device
        self.group = range(self.at_once)
        self.sums = self._zeros()
        self.outputs = {name: torch.zeros(self.count, dtype=torch.float64) for name in OUTPUTS}
        self.kept = [Batches(scratch) for _ in range(3)] if 0 < self.at_once < self.count else None
        # `grouped_mm` calls no hooks inside: the experts run one by one here instead.
        module.forward = types.MethodType(lambda _, *inputs: self.forward(*inputs), module)

    def detach(self) -> None:
        del self.module.forward

    def shapes(self) -> dict[str, tuple[tuple, torch.dtype]]:
        """What is summed for each expert: tokens, Gram matrices of the inputs of gate/up and of down, their absolute
        values, magnitudes of the latter's (see `outlier_share`), the sum of these, and OUTPUTS."""
        return {
            "tokens": ((), torch.int64),
            "gram_in": ((self.hidden, self.hidden), torch.float32),
            "gram_mid": ((self.inner, self.inner), torch.float32),
            "abs_in": ((self.hidden,), torch.float32),
            "abs_mid": ((self.inner,), torch.float32),
            "magnitudes": ((OCTAVES * BINS_PER_OCTAVE,), torch.int64),
            "magnitude_sum": ((), torch.float64),
            **{name: ((), torch.float64) for name in OUTPUTS},
        }

    def _zeros(self) -> dict[str, torch.Tensor]:
        """Sums of the present group, {name: (experts of it, ...)}."""
        return {
            name: torch.zeros(len(self.group), *shape, dtype=dtype, device=self.device)
            for name, (shape, dtype) in self.shapes().items()
            if name not in OUTPUTS
        }

    def groups(self) -> Iterator[tuple[range, dict[str, torch.Tensor]]]:
        """(experts, their sums {name: (experts, ...)}) group by group; after all batches have passed."""
        for group, sums in self._groups():
            yield group, sums | {name: total[group.start : group.stop] for name, total in self.outputs.items()}

    def _groups(self) -> Iterator[tuple[range, dict[str, torch.Tensor]]]:
        yield self.group, self.sums
        for first in range(self.at_once, self.count, self.at_once):
            self.group = range(first, min(first + self.at_once, self.count))
            self.sums = {}  # the last group's go before these come
            self.sums = self._zeros()
            assert self.kept is not None
            for x, token, expert in zip(*self.kept):
                pairs = Routed(x.to(self.device), token.to(self.device), expert)
                for index, rows in pairs_of(expert, self.count):
                    if index in self.group:
                        x = pairs.x[pairs.token[rows]]
                        self._observe(index, x, intermediate(self.module, index, x))
            yield self.group, self.sums

    def forward(self, *inputs):
        routed = route(self.module, *inputs)
        if self.kept:
            for kept, value in zip(self.kept, (routed.x, routed.token, routed.expert)):
                kept.append(value)
        y = routed.x[routed.token]  # what identity experts hand on
        for expert, rows in pairs_of(routed.expert, self.count):
            x = y[rows]
            inner = intermediate(self.module, expert, x)
            if expert in self.group:
                self._observe(expert, x, inner)
            y[rows] = expert_output(self.module, expert, inner)
            if self.group:
                self._weigh(expert, y[rows], None if routed.scale is None else routed.scale[rows])
        return gather(self.module, y, routed, *inputs)

    def _weigh(self, expert: int, out: torch.Tensor, scale: torch.Tensor | None) -> None:
        """Counts outputs (n, hidden) and the router's weights (n,), which are 1 where the input was scaled instead."""
        norms = out.float().norm(dim=-1).double()
        weights = torch.ones_like(norms) if scale is None else scale.double()
        for name, values in zip(OUTPUTS, (weights, norms, weights * norms)):
            self.outputs[name][expert] += values.sum().cpu()

    def _observe(self, expert: int, x: torch.Tensor, inner: torch.Tensor) -> None:
        at, sums, x, inner = expert - self.group.start, self.sums, x.float(), inner.float()
        sums["tokens"][at] += len(x)
        sums["gram_in"][at].addmm_(x.T, x)
        sums["gram_mid"][at].addmm_(inner.T, inner)
        sums["abs_in"][at] += x.abs().sum(0)
        for part in inner.abs().split(PART):
            sums["abs_mid"][at] += part.sum(0)
            octave = part.clamp(min=2.0**LOWEST_OCTAVE).log2_().sub_(LOWEST_OCTAVE).mul_(BINS_PER_OCTAVE)
            bins = octave.int().clamp_(max=OCTAVES * BINS_PER_OCTAVE - 1)
            sums["magnitudes"][at] += torch.bincount(bins.flatten(), minlength=OCTAVES * BINS_PER_OCTAVE)
            sums["magnitude_sum"][at] += part.sum(dtype=torch.float64)


def outlier_share(magnitudes: torch.Tensor, magnitude_sum: torch.Tensor, threshold: float) -> torch.Tensor:
    """a_i of MoE-SVD eq. 10: share of |activation| above `threshold` times the mean, per expert (E,) float64.

    magnitudes (E, bins) as LayerRecorder counts them; linear within the bin that the threshold falls in.
    An expert without activations has share 0.
    """
    counts = magnitudes.double()
    total = counts.sum(1)
    mean = magnitude_sum / total.clamp(min=1)
    edge = (threshold * mean).clamp(min=2.0**LOWEST_OCTAVE).log2() - LOWEST_OCTAVE
    edge = (edge * BINS_PER_OCTAVE).clamp(max=counts.shape[1] - 1)
    index = edge.long()
    above = counts.flip(1).cumsum(1).flip(1)  # counts in this bin and all higher ones
    here = counts.gather(1, index[:, None])[:, 0]
    share = above.gather(1, index[:, None])[:, 0] - here * (edge - index)
    return torch.where(total > 0, share / total.clamp(min=1), 0.0)
