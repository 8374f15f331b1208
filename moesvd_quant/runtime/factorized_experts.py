"""Experts in factors, as their layout (`parts`) says. A copy lies in every checkpoint."""

from typing import Any

import torch
from torch import nn

from .expert_products import ExpertProducts
from .native_call import add_bias, apply_gate
from .native_experts import form_of
from .parts import JOINT, Projections, joined, projection_shapes, separate
from .routers import Sources


class FactorizedExperts(ExpertProducts):
    """Drop-in for the experts of any architecture that `native_experts` knows, built from them and a layout."""

    def __init__(self, native: nn.Module, layout: Projections, sources: Sources | None = None):
        """native: the module to stand in for, of the architecture's own class or one of ours. sources: from which of
        its experts those of this module come; None: the same ones. One of ours keeps its own."""
        super().__init__()
        ours = isinstance(native, FactorizedExperts)
        if not ours:
            self.shapes = projection_shapes(native)
            self.native_class, self.form = type(native), form_of(native)
            self.original_experts = len(self.form.weights(native)["down"])
            self.sources, self.experts = sources, len(sources or range(self.original_experts))
            # Weights are banks (rows, out, in), whatever they were in the native module.
            self.flags = self.form.flags(native)._replace(is_transposed=False)
        own = ("formats", "kinds", "bank_shapes")
        state = {k: v for k, v in vars(native).items() if not k.startswith("_") and k not in own}
        self.__dict__.update(state)  # alpha, limit, flags, config: all that is not a weight
        if JOINT in layout and JOINT not in self.shapes:
            self.shapes = joined(self.shapes)
        weights = set(native.stored_tensors()) if ours else set(self.form.parameters(native))
        holders = {name.partition(".")[0] for name in weights}
        for name, child in native._modules.items():
            if name not in holders:
                self.add_module(name, child)
        for name, other in native.named_parameters(recurse=False):  # biases, a row for each expert
            if name not in weights:
                self.register_parameter(name, other if ours or sources is None else _rows_of(other, sources))
        self.is_transposed = False  # peft asks
        self.layout = layout
        self._maps: dict[tuple, Any] = {}
        self.described: dict[str, Any] = {}  # see `chains_of`
        kind = next((p for p in native.parameters() if p.is_floating_point()), torch.empty(0))
        for key, bank in self.banks():
            self.add_bank(key, bank.shape, bank.form, kind.dtype, kind.device)
        self.add_channels(native)

    def banks(self):
        """Yields (name, Bank) of every bank of the layout."""
        for projection, parts in self.layout.items():
            for i, part in enumerate(parts):
                for name, bank in part.banks(*self.shapes[projection]).items():
                    yield f"{projection}_{i}_{name}", bank

    def bank(self, projection, i, bank, dtype, row=None):
        """Bank of part i of a projection: float (rows, a, b), or (a, b) of one row."""
        return self.weight_rows(f"{projection}_{i}_{bank}", dtype, row)

    def dense(self, projection, expert, dtype=torch.float32):
        """Effective weight (out, in) of one expert."""
        if projection not in self.shapes:  # gate or up of both
            return separate({JOINT: self.dense(JOINT, expert, dtype).T})[projection].T
        weight = torch.zeros(self.shapes[projection], dtype=dtype, device=self.device)
        for i, part in enumerate(self.layout[projection]):
            if expert in part.experts:
                at = part.experts.index(expert)
                first, *rest = (self.bank(projection, i, bank, dtype, part.users(bank)[at]) for bank in part.chain)
                for bank in rest:
                    first = bank @ first
                weight = weight + self.spread(part, first)
        return weight

    def activate(self, pairs):
        """Gate and up (or up alone) -> the input of down, by the native class's own gate."""
        if not self.flags.has_gate:
            return self.flags.act_fn(pairs["up"])
        both = (pairs["gate"], pairs["up"])
        gate = getattr(self.native_class, "_apply_gate", None)
        if gate is None or gate.__name__ == "_default_apply_gate":  # it would chunk what is joined here
            return self.flags.act_fn(pairs["gate"]) * pairs["up"]
        joint = torch.cat(both, -1) if self.flags.is_concatenated else torch.stack(both, -1).flatten(-2)
        return apply_gate(self, self.native_class, joint, self.flags.act_fn)

    def forward(self, *inputs):
        """As the native module is called, for example hidden (T, H), index (T, k), weights (T, k) -> (T, H)."""
        routed = self.form.route(self, *inputs)
        bases = [i for i, part in enumerate(self.layout["down"]) if self.shared_input(part) == "dense"]
        plain = not (self.flags.has_post_expert_norm or hasattr(self, "identity_expert"))
        if bases and plain and hasattr(self.form, "combine"):
            y = self._with_base_last(routed, bases)
            return y.to(inputs[0].dtype).view(inputs[0].shape)
        return self.form.gather(self, self.compute(routed.x, routed.token, routed.expert), routed, *inputs)

    def _with_base_last(self, routed, bases):
        """(tokens, H). The base of down is linear: it meets each token once, after its experts are summed."""
        masks: dict[str, torch.Tensor] = {}
        inner = self._inner(routed.x, routed.token, routed.expert, masks)
        each = torch.arange(len(inner), device=inner.device)
        y = self.project(inner, each, routed.expert, "down", masks, with_base=False)
        if self.flags.has_bias:
            y = y + self.down_proj_bias[routed.expert]
        x = self.form.combine(inner, routed).to(inner.dtype)
        return self.form.combine(y, routed) + sum(self.apply_base(x, "down", i, masks) for i in bases)

    def compute(self, x, token, ids):
        """x (tokens, H) -> (pairs, H) for pairs of a token (its row of x) and an expert, sorted by expert."""
        if hasattr(self, "identity_expert"):  # experts past the last one hand their input on
            known = int((ids < self.experts).sum())
            return torch.cat([self._compute(x, token[:known], ids[:known]), x[token[known:]]])
        return self._compute(x, token, ids)

    def _compute(self, x, token, ids):
        if (steps := self.steps(x.device.type)) and not self.has_kernels(x):
            y = self.by_expert(x, token, ids, steps)
        else:
            masks: dict[str, torch.Tensor] = {}
            inner = self._inner(x, token, ids, masks)
            expanded = {"tokens": masks["tokens"][token]} if masks else {}
            y = self.project(inner, torch.arange(len(ids), device=ids.device), ids, "down", expanded)
        if self.flags.has_bias:
            y = y + self.down_proj_bias[ids]
        return self.post_expert_norm(y) if self.flags.has_post_expert_norm else y

    def _inner(self, x, token, ids, masks):
        """Input of down (pairs, inner); masks: see `project`."""
        names = [name for name in self.shapes if name != "down"]
        pairs = separate({name: self.project(x, token, ids, name, masks) for name in names})
        add_bias(self, self.flags, pairs, ids)
        return self.activate(pairs)


def _rows_of(parameter, sources):
    """The rows of the first source of each expert."""
    kept = torch.tensor([group[0] for group in sources], device=parameter.device)
    return nn.Parameter(parameter.detach().index_select(0, kept), requires_grad=parameter.requires_grad)
