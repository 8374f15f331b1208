"""The base of D2-MoE: one dense weight for all experts, of which each token may use a part. A copy lies in every
checkpoint."""

import torch
import torch.nn.functional as F

from .parts import channel_tensors
from .stored import Stored


class PrunedBase(Stored):
    """What `FactorizedExperts` does with dense parts that are pruned along the intermediate dimension."""

    def add_channels(self, native):
        """The tensors of the channels that are kept, those of `native` where it has them."""
        for key, size in channel_tensors(self.layout).items():
            given = native._parameters.get(key)
            tensor = torch.empty(size, dtype=torch.int32, device=self.device) if given is None else given
            self.register_parameter(key, torch.nn.Parameter(tensor, requires_grad=False))

    def spread(self, part, weight):
        """A pruned dense weight at its full size (out, in), zero where it was pruned."""
        for axis, kind in enumerate(("rows", "columns")):
            if getattr(part, kind) is not None:
                size = list(weight.shape)
                size[axis] = self.shapes["down"][1]
                weight = weight.new_zeros(size).index_copy(axis, self.channels.long(), weight)
        return weight

    def channel_mask(self, probe):
        """1 for the channels that each token uses of a pruned base, 0 for others, like probe (tokens, channels): what
        the first projection of the base puts out. A token decides for itself, whatever it is batched with: by its
        share of the activations' energy, added to the calibrated share."""
        count = min(part.dynamic for part in self.layout["down"] if part.dynamic is not None)
        given = {"gate": probe, "up": torch.ones_like(probe)} if self.flags.has_gate else {"up": probe}
        prior, weight = (self._parameters[f"channel_{k}"].view(torch.float32) for k in ("prior", "weight"))
        energy = self.activate(given).float().square() * weight
        score = prior + energy / energy.sum(-1, keepdim=True).clamp(min=1e-30)
        return torch.zeros_like(probe).scatter(-1, score.topk(count, -1).indices, 1.0)

    def apply_base(self, x, projection, i, masks):
        """Part i, a dense weight for every token whatever its expert: x (n, in) -> (n, out). masks: see `project`."""
        part = self.layout[projection][i]
        if part.columns is not None:
            x = x[:, self.channels.long()]
            x = x * masks["tokens"] if part.dynamic is not None else x
        y = F.linear(x, self.bank(projection, i, "dense", x.dtype, 0))
        if part.rows is None:
            return y
        if part.dynamic is not None:
            y = y * masks["tokens"]
        elif "channel_prior" in self._parameters:  # gate, or up without a gate, comes first: up and down follow it
            masks["tokens"] = self.channel_mask(y)
        return y.new_zeros(len(y), self.shapes[projection][0]).index_copy(1, self.channels.long(), y)
