"""Experts in factors, as their layout (`parts`) says. A copy lies in every checkpoint."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .native_call import add_bias, apply_gate
from .native_experts import form_of
from .parts import JOINT, Projections, joined, projection_shapes, separate
from .pruned_base import PrunedBase
from .routers import Sources

ONE_BY_ONE = ("cpu",)  # devices on which a product for each expert is as fast as one grouped product


class FactorizedExperts(PrunedBase):
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

    def row_map(self, projection, i, bank, device):
        """Bank row of each expert, -1 where the part does not name it, as a cached tensor."""
        key = projection, i, bank, device
        if key not in self._maps:
            part = self.layout[projection][i]
            rows = torch.full((self.experts,), -1, dtype=torch.long)
            rows[part.experts] = torch.tensor(part.users(bank))
            self._maps[key] = rows.to(device)
        return self._maps[key]

    def bank_matmul(self, x, rows, projection, i, bank):
        """y[t] = bank[rows[t]] @ x[t], x (n, in), rows (n) -> (n, out): one grouped product over sorted rows."""
        part = self.layout[projection][i]
        count, (out, _) = max(part.users(bank)) + 1, part.sizes(*self.shapes[projection])[bank]
        if count == 1:
            return self.products(f"{projection}_{i}_{bank}", x, [len(x)])
        order = None if self.owns_rows(part, bank) else torch.argsort(rows, stable=True)
        x = x if order is None else x[order]
        sizes = torch.bincount(rows, minlength=count)
        aligned = out % 8 == 0 and x.shape[-1] % 8 == 0  # the grouped product wants rows of 16 bytes
        if aligned and not part.form(bank).packed and x.device.type not in ONE_BY_ONE:
            weight = self.bank(projection, i, bank, x.dtype)
            y = F.grouped_mm(x, weight.transpose(1, 2), offs=sizes.cumsum(0).int())
            if y.requires_grad:
                y.register_hook(torch.Tensor.contiguous)  # its backward takes no gradient with gaps
        else:  # on a CPU as fast as the grouped product
            y = self.products(f"{projection}_{i}_{bank}", x, sizes.tolist())
        return y if order is None else torch.empty_like(y).index_copy(0, order, y)

    def owns_rows(self, part, bank):
        """Whether each expert has a row of its own, in order: pairs sorted by expert are then sorted by row."""
        return part.users(bank) == list(range(len(part.experts))) and part.experts == sorted(part.experts)

    def steps(self, device_type):
        """{projection: for each expert its terms}, a term being the banks to multiply with, one after the other, as
        arguments of `weight_rows`; None where a bank is shared, or grouped products serve better. Made once."""
        key = "steps", device_type
        if key not in self._maps:
            parts = [part for parts in self.layout.values() for part in parts]
            banks = [(part, bank) for part in parts for bank in part.chain]
            alone = all(
                self.owns_rows(part, bank) and (device_type in ONE_BY_ONE or part.form(bank).packed)
                for part, bank in banks
            )
            served = alone and not any(map(self.shared_input, parts))
            self._maps[key] = {name: self._terms(name) for name in self.layout} if served else None
        return self._maps[key]

    def has_kernels(self, x):
        """Whether a packed bank is multiplied by a kernel, which takes the tokens of all experts at once."""
        found = (name for name, form in self.formats.items() if form.packed)
        return any(self.formats[name].has_kernel(self.bank_tensors(name), x) for name in found)

    def _terms(self, projection):
        terms: list[list] = [[] for _ in range(self.experts)]
        for i, part in enumerate(self.layout[projection]):
            for row, expert in enumerate(part.experts):
                terms[expert].append([(f"{projection}_{i}_{bank}", row) for bank in part.chain])
        return terms

    def by_expert(self, x, token, ids, steps):
        """x (tokens, in) -> (pairs, in), pairs sorted by expert: each expert from gate to down at once, so that what
        lies between stays in the cache, and one packed weight at a time is dequantized."""
        sizes = torch.bincount(ids, minlength=self.experts).tolist()
        done = []
        for expert, (at, own) in enumerate(zip(token.split(sizes), ids.split(sizes))):
            if len(at):
                hidden = x[at]
                pairs = separate({k: self.multiply(hidden, k, steps[k][expert]) for k in steps if k != "down"})
                add_bias(self, self.flags, pairs, own)
                done.append(self.multiply(self.activate(pairs), "down", steps["down"][expert]))
        return torch.cat(done) if done else x.new_zeros(0, self.shapes["down"][0])

    def multiply(self, x, projection, terms):
        """x (n, in) -> (n, out) by the effective weight of one expert, factor by factor."""
        y = None
        for banks in terms:
            h = x
            for name, row in banks:
                h = F.linear(h, self.weight_rows(name, x.dtype, row))
            y = h if y is None else y + h
        return x.new_zeros(len(x), self.shapes[projection][0]) if y is None else y

    def shared_input(self, part):
        """The bank that every token meets whatever its expert, first: a base, or a right factor."""
        first = part.chain[0]
        return first if len(part.experts) == self.experts and max(part.users(first)) == 0 else None

    def project(self, x, token, ids, projection, masks, with_base=True):
        """x (tokens, in) -> (pairs, out) for the (token, expert) pairs; shared banks see each token once.

        masks: {"tokens": (tokens, channels)}, filled by the first projection of a base that is pruned token by token.
        """
        y = None
        for i, part in enumerate(self.layout[projection]):
            first, *rest = part.chain
            shared = self.shared_input(part)
            if shared == "dense":
                if with_base:
                    h = self.apply_base(x, projection, i, masks)[token]
                    y = h if y is None else y + h
                continue
            rows = self.row_map(projection, i, first, x.device)[ids]
            if shared:
                h, chosen = self.bank_matmul(x, rows, projection, i, first)[token], None
            else:
                chosen = None if len(part.experts) == self.experts else (rows >= 0).nonzero()[:, 0]
                if chosen is not None and not len(chosen):
                    continue
                h = x[token if chosen is None else token[chosen]]
                h = self.bank_matmul(h, rows if chosen is None else rows[chosen], projection, i, first)
            for bank in rest:
                rows = self.row_map(projection, i, bank, x.device)[ids]
                h = self.bank_matmul(h, rows if chosen is None else rows[chosen], projection, i, bank)
            if chosen is not None:
                h = h.new_zeros(len(ids), h.shape[1]).index_copy(0, chosen, h)
            y = h if y is None else y + h
        return x.new_zeros(len(ids), self.shapes[projection][0]) if y is None else y

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
