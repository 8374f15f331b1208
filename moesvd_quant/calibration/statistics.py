"""What a decoder layer sees: routing counts, Gram matrices and activation magnitudes, per expert.

All are sums over the calibration tokens in a fixed batch order, in float32.
"""

import types

import torch
from torch import nn

from ..model.experts import activate, dense_weights, expert_count, find_experts, find_linears, shapes_of
from ..model.stream import ModelError

# Magnitudes of activations are counted in bins of 1/16 octave, so that the outlier share of any threshold
# can be read later without a second walk.
LOWEST_OCTAVE, OCTAVES, BINS_PER_OCTAVE = -40, 60, 16


class LayerRecorder:
    """Attaches to a decoder layer, sums its statistics while batches pass, and detaches.

    tensors: {path/tokens (E,) int64, path/gram_in (E, hidden, hidden), path/gram_mid (E, inner, inner),
    path/abs_in (E, hidden) and path/abs_mid (E, inner) of absolute values, path/magnitudes (E, bins) int64,
    path/magnitude_sum (E,) float64} for each experts module, and {path/gram (in, in), path/tokens ()} for each other
    linear. Linears that read the same tensor (q, k, v) share one Gram matrix: `aliases` names the one that holds it.
    """

    def __init__(self, layer: nn.Module):
        self.tensors: dict[str, torch.Tensor] = {}
        self.aliases: dict[str, str] = {}
        self._last: tuple[str, torch.Tensor] | None = None
        self._hooks = []
        self._experts: list[nn.Module] = []
        for path, module in find_experts(layer):
            self._attach_experts(path, module)
        for path, module in find_linears(layer):
            hook = module.register_forward_pre_hook(lambda _, args, path=path: self._linear(path, args[0]))
            self._hooks.append(hook)

    def detach(self) -> dict[str, torch.Tensor]:
        """Removes all hooks and returns the sums."""
        for hook in self._hooks:
            hook.remove()
        for module in self._experts:
            del module.forward
        return self.tensors

    def _add(self, name: str, value: torch.Tensor) -> None:
        if name in self.tensors:
            self.tensors[name] += value
        else:
            self.tensors[name] = value

    def _linear(self, path: str, x: torch.Tensor) -> None:
        if path in self.aliases:
            return
        if self._last is not None and self._last[1] is x and path + "/gram" not in self.tensors:
            self.aliases[path] = self._last[0]
            return
        self._last = (path, x)
        flat = x.reshape(-1, x.shape[-1]).float()
        self._add(path + "/gram", flat.T @ flat)
        self._add(path + "/tokens", torch.tensor(len(flat)))

    def _attach_experts(self, path: str, module: nn.Module) -> None:
        if "channel_prior" in module._parameters:
            raise ModelError(
                f"{path}: each token chooses channels of the base (d2.dynamic): what its experts see cannot be "
                "recorded; run all stages in one recipe on the original model"
            )
        count, shapes = expert_count(module), shapes_of(module)
        hidden, inner = shapes["down"]
        device = next(module.parameters()).device
        zeros = lambda *size, dtype=torch.float32: torch.zeros(size, dtype=dtype, device=device)  # noqa: E731
        self.tensors |= {
            f"{path}/tokens": zeros(count, dtype=torch.int64),
            f"{path}/gram_in": zeros(count, hidden, hidden),
            f"{path}/gram_mid": zeros(count, inner, inner),
            f"{path}/abs_in": zeros(count, hidden),
            f"{path}/abs_mid": zeros(count, inner),
            f"{path}/magnitudes": zeros(count, OCTAVES * BINS_PER_OCTAVE, dtype=torch.int64),
            f"{path}/magnitude_sum": zeros(count, dtype=torch.float64),
        }

        def forward(module, hidden_states, top_k_index, top_k_weights):
            return self._experts_forward(path, module, hidden_states, top_k_index, top_k_weights)

        # `grouped_mm` calls no hooks inside: the experts run one by one here instead.
        module.forward = types.MethodType(forward, module)
        self._experts.append(module)

    def _experts_forward(self, path, module, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            token, position = torch.where(top_k_index == expert)
            x = hidden_states[token]
            weights = dense_weights(module, expert, x.dtype)
            pairs = {name: x @ weights[name].T for name in weights if name != "down"}
            inner = activate(module, pairs, expert)
            y = inner @ weights["down"].T
            if module.has_bias:
                y = y + module.down_proj_bias[expert]
            if module.has_post_expert_norm:
                y = module.post_expert_norm(y)
            y = y * top_k_weights[token, position, None]
            out.index_add_(0, token, y.to(out.dtype))  # a token meets an expert once: order cannot matter
            self._observe(path, expert, x.float(), inner.float())
        return out

    def _observe(self, path, expert, x, inner):
        sums = self.tensors
        sums[f"{path}/tokens"][expert] += len(x)
        sums[f"{path}/gram_in"][expert] += x.T @ x
        sums[f"{path}/gram_mid"][expert] += inner.T @ inner
        size = inner.abs()
        sums[f"{path}/abs_in"][expert] += x.abs().sum(0)
        sums[f"{path}/abs_mid"][expert] += size.sum(0)
        octave = size.clamp(min=2.0**LOWEST_OCTAVE).log2() - LOWEST_OCTAVE
        bins = (octave * BINS_PER_OCTAVE).long().clamp(max=OCTAVES * BINS_PER_OCTAVE - 1)
        sums[f"{path}/magnitudes"][expert] += torch.bincount(bins.flatten(), minlength=OCTAVES * BINS_PER_OCTAVE)
        sums[f"{path}/magnitude_sum"][expert] += size.double().sum()


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
