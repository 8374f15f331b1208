"""Factorized and packed experts as a transformers model. A copy lies in every checkpoint, with the files of SHIPPED.

They need torch and transformers alone, so that a checkpoint opens without moesvd_quant. The layout
(`config.moesvd`) says for each experts module and projection which tensors make up its weights:

    W[e] = dense[d(e)] + sum_t left_t[l_t(e)] @ right_t[r_t(e)]

A projection is a list of parts; a part holds one bank of dense rows, or a bank of left and one of right
factors of a single rank, for the experts it names. Experts that no part names have weight zero. Gate and up may be one
projection, `gate_up`, whose rows are those of gate and then those of up: they then share their right factors. A bank is
floating point, or packed (see `unpack`). Packed tensors and the bits of their scales are integers, so that
no cast of the model can touch them.

A dense part may be pruned along the intermediate dimension: it then has `rows` of gate and up, or `columns` of down,
only for the `channels` of its module. Where up and down also say `dynamic`, each token uses just that many of them.
"""

import hashlib
import json
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from .modeling_deepseek import DeepseekForCausalLM as DeepseekForCausalLM  # its model type is registered by that
from .native_experts import apply_gate, form_of

FORMAT = 1
SHIPPED = ("modeling_moesvd.py", "native_experts.py", "modeling_deepseek.py")  # what a checkpoint needs to open itself
MANIFEST = "moesvd.json"
JOINT = "gate_up"  # gate and up as one projection
ONE_BY_ONE = ("cpu",)  # devices on which a product for each expert is as fast as one grouped product


def pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 values (..., n) below 2**bits -> uint8 (..., ceil(n/8)*bits): eight values fill `bits` bytes."""
    values = F.pad(values, (0, -values.shape[-1] % 8)).unflatten(-1, (-1, 8)).long()
    word = (values << (torch.arange(8, device=values.device) * bits)).sum(-1, keepdim=True)
    shift = torch.arange(bits, device=values.device) * 8
    return (word >> shift & 255).to(torch.uint8).flatten(-2)


def unpack(packed: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """The inverse of `pack`: uint8 (..., n)."""
    if bits == 8:
        return packed[..., :n]
    if bits in (2, 4):  # values do not cross bytes
        shift = torch.arange(0, 8, bits, device=packed.device, dtype=torch.uint8)
        return (packed.unsqueeze(-1) >> shift & (1 << bits) - 1).flatten(-2)[..., :n]
    parts = packed.unflatten(-1, (-1, bits)).int()
    word = sum(parts[..., i] << 8 * i for i in range(bits))
    shift = torch.arange(8, device=packed.device, dtype=torch.int32) * bits
    return (word.unsqueeze(-1) >> shift & (1 << bits) - 1).to(torch.uint8).flatten(-2)[..., :n]


def dequantize(codes, scales, zeros, quant: dict, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """(codes - zero) * scale per group of `group_size` columns (the last one may be short).

    codes uint8 (..., rows, packed), scales int16 (the bits of fp16) (..., rows, groups), zeros packed along
    the groups or None where symmetric (zero = 2**(bits-1)). Returns (..., rows, columns) in `dtype`.
    """
    bits, size, groups = quant["bits"], quant["group_size"], scales.shape[-1]
    scale = scales.view(torch.float16).float().unsqueeze(-1)
    zero = 2 ** (bits - 1) if zeros is None else unpack(zeros, bits, groups).float().unsqueeze(-1)
    value = F.pad(unpack(codes, bits, columns).float(), (0, groups * size - columns)).unflatten(-1, (groups, size))
    return ((value - zero) * scale).flatten(-2)[..., :columns].to(dtype)


def bank_tensors(name: str, shape: tuple, quant: dict | None, dtype: torch.dtype) -> dict:
    """Tensors that store a bank of `shape` (..., rows, columns): {name: (shape, dtype)}."""
    if quant is None:
        return {name: (tuple(shape), dtype)}
    *lead, columns = shape
    bits, groups = quant["bits"], -(-columns // quant["group_size"])
    tensors = {
        f"{name}_codes": ((*lead, -(-columns // 8) * bits), torch.uint8),
        f"{name}_scales": ((*lead, groups), torch.int16),
    }
    if not quant["sym"]:
        tensors[f"{name}_zeros"] = ((*lead, -(-groups // 8) * bits), torch.uint8)
    return tensors


def part_banks(part: dict, out_features: int, in_features: int) -> dict:
    """Banks of a part: {"dense" | "left" | "right": shape}."""
    if "dense" in part:
        return {"dense": (max(part["dense"]) + 1, part.get("rows", out_features), part.get("columns", in_features))}
    return {
        "left": (max(part["left"]) + 1, out_features, part["rank"]),
        "right": (max(part["right"]) + 1, part["rank"], in_features),
    }


def channel_tensors(layout: dict) -> dict:
    """int32 tensors of a module with pruned dense parts, {name: length}: the channels they keep, and, as the bits of
    fp32, what a token's choice among these starts from and how it weighs their activations."""
    pruned = [part for parts in layout.values() for part in parts if "rows" in part or "columns" in part]
    if not pruned:
        return {}
    names = ["channels"]
    if any("dynamic" in part for part in pruned):
        names += ["channel_prior", "channel_weight"]
    return dict.fromkeys(names, pruned[0].get("rows") or pruned[0]["columns"])


def projection_shapes(experts: nn.Module) -> dict:
    """(out, in) of each projection of a native experts module: {"gate", "up", "down"} or without gate."""
    form = form_of(experts)
    if form is None:
        raise ValueError(
            f"{type(experts).__name__} is no fused experts module; a library that unfuses experts (gptqmodel does) "
            "was at work in this process: open the checkpoint in a fresh one"
        )
    return {name: tuple(weight.shape[1:]) for name, weight in form.weights(experts).items()}


def joined(shapes: dict) -> dict:
    """(out, in) of each projection where gate and up are one."""
    (gate, inputs), (up, _) = shapes["gate"], shapes["up"]
    return {JOINT: (gate + up, inputs), "down": shapes["down"]}


def separate(pairs: dict) -> dict:
    """Outputs (n, out) of gate and of up, from those of each projection before down."""
    return dict(zip(("gate", "up"), pairs[JOINT].chunk(2, -1))) if JOINT in pairs else pairs


class Packed(nn.Module):
    """Base of modules whose weights are float or packed banks."""

    def add_bank(self, name, shape, quant, dtype, device):
        for key, (size, kind) in bank_tensors(name, shape, quant, dtype).items():
            tensor = torch.empty(size, dtype=kind, device=device)
            self.register_parameter(key, nn.Parameter(tensor, requires_grad=kind.is_floating_point))

    def weight_rows(self, name: str, quant: dict | None, columns: int, dtype: torch.dtype, row: int | None):
        """Bank `name` (row None) or one row of it, dequantized into `dtype` where it is packed."""
        if quant is None:
            bank = getattr(self, name)  # an adapter may stand in front of the parameter
            return (bank if row is None else bank[row]).to(dtype)
        codes, scales, zeros = (self._parameters.get(f"{name}_{kind}") for kind in ("codes", "scales", "zeros"))
        if row is not None:
            codes, scales, zeros = codes[row], scales[row], None if zeros is None else zeros[row]
        return dequantize(codes, scales, zeros, quant, columns, dtype)


class PackedLinear(Packed):
    """nn.Linear with a packed weight (out, in), an optional float bias, and where `quant` names a rank a float
    low-rank term beside the weight: left (out, rank) @ right (rank, in). `weight` serves modules that
    multiply with it themselves."""

    def __init__(self, in_features, out_features, bias, quant, dtype=None, device=None):
        super().__init__()
        self.in_features, self.out_features, self.quant = in_features, out_features, quant
        self.add_bank("weight", (out_features, in_features), quant, dtype, device)
        if self.rank:
            self.add_bank("left", (out_features, self.rank), None, dtype, device)
            self.add_bank("right", (self.rank, in_features), None, dtype, device)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        self.register_buffer("like", torch.empty(0, dtype=dtype, device="cpu"), persistent=False)  # follows casts

    @property
    def rank(self) -> int:
        return self.quant.get("rank", 0)

    def packed_weight(self, dtype=torch.float32):
        return self.weight_rows("weight", self.quant, self.in_features, dtype, None)

    @property
    def weight(self):
        return self.dense_weight(self.like.dtype)

    def dense_weight(self, dtype=torch.float32):
        """Effective weight (out, in)."""
        weight = self.packed_weight(dtype)
        return weight + self.left.to(dtype) @ self.right.to(dtype) if self.rank else weight

    def forward(self, x):
        y = F.linear(x, self.packed_weight(x.dtype), self.bias)
        if not self.rank:
            return y
        return y + F.linear(F.linear(x, self.right.to(x.dtype)), self.left.to(x.dtype))


class FactorizedExperts(Packed):
    """Drop-in for the experts of any architecture that `native_experts` knows, built from them and a layout."""

    def __init__(self, native: nn.Module, layout: dict):
        """native: the module to stand in for, of the architecture's own class or one of ours."""
        super().__init__()
        ours = isinstance(native, FactorizedExperts)
        if not ours:
            shapes = projection_shapes(native)
            self.shapes = joined(shapes) if JOINT in layout else shapes
            self.native_class, self.form = type(native), form_of(native)
            self.experts = len(self.form.weights(native)["down"])
        state = {k: v for k, v in vars(native).items() if not k.startswith("_")}
        self.__dict__.update(state)  # alpha, limit, flags, config: all that is not a weight
        weights = {name for name, *_ in native.banks()} if ours else set(self.form.parameters(native))
        holders = {name.partition(".")[0] for name in weights}
        for name, child in native._modules.items():
            if name not in holders:
                self.add_module(name, child)
        for name, other in native.named_parameters(recurse=False):  # biases
            if name.partition("_codes")[0].partition("_scales")[0].partition("_zeros")[0] not in weights:
                self.register_parameter(name, other)
        self.is_transposed = False  # banks are (rows, out, in), whatever the native weights were; peft asks
        self.layout = layout
        self._maps: dict[tuple, Any] = {}
        kind = next(p for p in native.parameters() if p.is_floating_point())
        for key, shape, quant in self.banks():
            self.add_bank(key, shape, quant, kind.dtype, kind.device)
        for key, size in channel_tensors(layout).items():
            given = native._parameters.get(key)
            tensor = torch.empty(size, dtype=torch.int32, device=kind.device) if given is None else given
            self.register_parameter(key, nn.Parameter(tensor, requires_grad=False))

    def banks(self):
        """Yields (parameter name, shape, quant) of every bank of the layout."""
        for projection, parts in self.layout.items():
            for i, part in enumerate(parts):
                for bank, shape in part_banks(part, *self.shapes[projection]).items():
                    yield f"{projection}_{i}_{bank}", shape, part["quant"].get(bank)

    def bank(self, projection, i, bank, dtype, row=None):
        """Bank of part i of a projection: float (rows, a, b), or (a, b) of one row."""
        part = self.layout[projection][i]
        columns = part_banks(part, *self.shapes[projection])[bank][-1]
        return self.weight_rows(f"{projection}_{i}_{bank}", part["quant"].get(bank), columns, dtype, row)

    def dense(self, projection, expert, dtype=torch.float32):
        """Effective weight (out, in) of one expert."""
        if projection not in self.shapes:  # gate or up of both
            return separate({JOINT: self.dense(JOINT, expert, dtype).T})[projection].T
        weight = torch.zeros(self.shapes[projection], dtype=dtype, device=self.device)
        for i, part in enumerate(self.layout[projection]):
            if expert not in part["experts"]:
                continue
            at = part["experts"].index(expert)
            if "dense" in part:
                weight = weight + self.spread(part, self.bank(projection, i, "dense", dtype, part["dense"][at]))
            else:
                left = self.bank(projection, i, "left", dtype, part["left"][at])
                weight = weight + left @ self.bank(projection, i, "right", dtype, part["right"][at])
        return weight

    @property
    def device(self):
        return next(self.parameters()).device

    def row_map(self, projection, i, bank, device):
        """Bank row of each expert, -1 where the part does not name it, as a cached tensor."""
        key = projection, i, bank, device
        if key not in self._maps:
            part = self.layout[projection][i]
            rows = torch.full((self.experts,), -1, dtype=torch.long)
            rows[part["experts"]] = torch.tensor(part[bank])
            self._maps[key] = rows.to(device)
        return self._maps[key]

    def bank_matmul(self, x, rows, projection, i, bank):
        """y[t] = bank[rows[t]] @ x[t], x (n, in), rows (n) -> (n, out): one grouped product over sorted rows."""
        part = self.layout[projection][i]
        count, out, _ = part_banks(part, *self.shapes[projection])[bank]
        if count == 1:
            return F.linear(x, self.bank(projection, i, bank, x.dtype, 0))
        order = None if self.owns_rows(part, bank) else torch.argsort(rows, stable=True)
        x = x if order is None else x[order]
        sizes = torch.bincount(rows, minlength=count)
        if part["quant"].get(bank) is None and x.device.type not in ONE_BY_ONE:
            weight = self.bank(projection, i, bank, x.dtype)
            y = F.grouped_mm(x, weight.transpose(1, 2), offs=sizes.cumsum(0).int())
            if y.requires_grad:
                y.register_hook(torch.Tensor.contiguous)  # its backward takes no gradient with gaps
        else:  # one expert's weight is dequantized at a time; on a CPU this is as fast as the grouped product
            chunks = [
                F.linear(chunk, self.bank(projection, i, bank, x.dtype, row))
                for row, chunk in enumerate(x.split(sizes.tolist()))
                if len(chunk)
            ]
            y = torch.cat(chunks) if chunks else x.new_zeros(0, out)
        return y if order is None else torch.empty_like(y).index_copy(0, order, y)

    def owns_rows(self, part, bank):
        """Whether each expert has a row of its own, in order: pairs sorted by expert are then sorted by row."""
        experts = part["experts"]
        return part[bank] == list(range(len(experts))) and experts == sorted(experts)

    def steps(self, device_type):
        """{projection: for each expert its terms}, a term being the banks to multiply with, one after the other, as
        arguments of `weight_rows`; None where a bank is shared, or grouped products serve better. Made once."""
        key = "steps", device_type
        if key not in self._maps:
            parts = [part for parts in self.layout.values() for part in parts]
            banks = [(part, bank) for part in parts for bank in ("dense", "right", "left") if bank in part]
            alone = all(self.owns_rows(*at) and (device_type in ONE_BY_ONE or at[1] in at[0]["quant"]) for at in banks)
            served = alone and not any(map(self.shared_input, parts))
            self._maps[key] = {name: self._terms(name) for name in self.layout} if served else None
        return self._maps[key]

    def _terms(self, projection):
        terms: list[list] = [[] for _ in range(self.experts)]
        for i, part in enumerate(self.layout[projection]):
            shapes = part_banks(part, *self.shapes[projection])
            for row, expert in enumerate(part["experts"]):
                banks = [bank for bank in ("dense", "right", "left") if bank in part]
                at = [(f"{projection}_{i}_{bank}", part["quant"].get(bank), shapes[bank][-1]) for bank in banks]
                terms[expert].append([(*where, row) for where in at])
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
                self.add_bias(pairs, own)
                done.append(self.multiply(self.activate(pairs), "down", steps["down"][expert]))
        return torch.cat(done) if done else x.new_zeros(0, self.shapes["down"][0])

    def multiply(self, x, projection, terms):
        """x (n, in) -> (n, out) by the effective weight of one expert, factor by factor."""
        y = None
        for banks in terms:
            h = x
            for name, quant, columns, row in banks:
                h = F.linear(h, self.weight_rows(name, quant, columns, x.dtype, row))
            y = h if y is None else y + h
        return x.new_zeros(len(x), self.shapes[projection][0]) if y is None else y

    def spread(self, part, weight):
        """A pruned dense weight at its full size (out, in), zero where it was pruned."""
        for axis, kind in enumerate(("rows", "columns")):
            if kind in part:
                size = list(weight.shape)
                size[axis] = self.shapes["down"][1]
                weight = weight.new_zeros(size).index_copy(axis, self.channels.long(), weight)
        return weight

    def channel_mask(self, probe):
        """1 for the channels that each token uses of a pruned base, 0 for others, like probe (tokens, channels): what
        the first projection of the base puts out. A token decides for itself, whatever it is batched with: by its
        share of the activations' energy, added to the calibrated share."""
        count = min(part["dynamic"] for part in self.layout["down"] if "dynamic" in part)
        given = {"gate": probe, "up": torch.ones_like(probe)} if self.has_gate else {"up": probe}
        prior, weight = (self._parameters[f"channel_{k}"].view(torch.float32) for k in ("prior", "weight"))
        energy = self.activate(given).float().square() * weight
        score = prior + energy / energy.sum(-1, keepdim=True).clamp(min=1e-30)
        return torch.zeros_like(probe).scatter(-1, score.topk(count, -1).indices, 1.0)

    def shared_input(self, part):
        """The bank that every token meets whatever its expert, first: a base, or a right factor."""
        whole = len(part["experts"]) == self.experts
        name = "dense" if "dense" in part else "right"
        return name if whole and max(part[name]) == 0 else None

    def apply_base(self, x, projection, i, masks):
        """Part i, a dense weight for every token whatever its expert: x (n, in) -> (n, out). masks: see `project`."""
        part = self.layout[projection][i]
        if "columns" in part:
            x = x[:, self.channels.long()]
            x = x * masks["tokens"] if "dynamic" in part else x
        y = F.linear(x, self.bank(projection, i, "dense", x.dtype, 0))
        if "rows" not in part:
            return y
        if "dynamic" in part:
            y = y * masks["tokens"]
        elif "channel_prior" in self._parameters:  # gate, or up without a gate, comes first: up and down follow it
            masks["tokens"] = self.channel_mask(y)
        return y.new_zeros(len(y), self.shapes[projection][0]).index_copy(1, self.channels.long(), y)

    def project(self, x, token, ids, projection, masks, with_base=True):
        """x (tokens, in) -> (pairs, out) for the (token, expert) pairs; shared banks see each token once.

        masks: {"tokens": (tokens, channels)}, filled by the first projection of a base that is pruned token by token.
        """
        y = None
        for i, part in enumerate(self.layout[projection]):
            first, last = ("dense", None) if "dense" in part else ("right", "left")
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
                chosen = None if len(part["experts"]) == self.experts else (rows >= 0).nonzero()[:, 0]
                h = x[token if chosen is None else token[chosen]]
                h = self.bank_matmul(h, rows if chosen is None else rows[chosen], projection, i, first)
            if last:
                rows = self.row_map(projection, i, last, x.device)[ids]
                h = self.bank_matmul(h, rows if chosen is None else rows[chosen], projection, i, last)
            if chosen is not None:
                h = h.new_zeros(len(ids), h.shape[1]).index_copy(0, chosen, h)
            y = h if y is None else y + h
        return x.new_zeros(len(ids), self.shapes[projection][0]) if y is None else y

    def activate(self, pairs):
        """Gate and up (or up alone) -> the input of down, by the native class's own gate."""
        if not self.has_gate:
            up = pairs["up"]
            return self.act_fn(up)
        both = (pairs["gate"], pairs["up"])
        gate = getattr(self.native_class, "_apply_gate", None)
        if gate is None or gate.__name__ == "_default_apply_gate":  # it would chunk what is joined here
            return self.act_fn(pairs["gate"]) * pairs["up"]
        joint = torch.cat(both, -1) if self.is_concatenated else torch.stack(both, -1).flatten(-2)
        return apply_gate(self, self.native_class, joint)

    def add_bias(self, pairs, ids):
        if not self.has_bias:
            return
        name = "gate_up_proj_bias" if self.has_gate else "up_proj_bias"
        bias = getattr(self, name)[ids]
        if not self.has_gate:
            pairs["up"] = pairs["up"] + bias
            return
        gate, up = bias.chunk(2, -1) if self.is_concatenated else (bias[..., ::2], bias[..., 1::2])
        pairs["gate"], pairs["up"] = pairs["gate"] + gate, pairs["up"] + up

    def forward(self, *inputs):
        """As the native module is called, for example hidden (T, H), index (T, k), weights (T, k) -> (T, H)."""
        routed = self.form.route(self, *inputs)
        bases = [i for i, part in enumerate(self.layout["down"]) if self.shared_input(part) == "dense"]
        plain = not (self.has_post_expert_norm or hasattr(self, "identity_expert"))
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
        if self.has_bias:
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
        if steps := self.steps(x.device.type):
            y = self.by_expert(x, token, ids, steps)
        else:
            masks: dict[str, torch.Tensor] = {}
            inner = self._inner(x, token, ids, masks)
            expanded = {"tokens": masks["tokens"][token]} if masks else {}
            y = self.project(inner, torch.arange(len(ids), device=ids.device), ids, "down", expanded)
        if self.has_bias:
            y = y + self.down_proj_bias[ids]
        return self.post_expert_norm(y) if self.has_post_expert_norm else y

    def _inner(self, x, token, ids, masks):
        """Input of down (pairs, inner); masks: see `project`."""
        names = [name for name in self.shapes if name != "down"]
        pairs = separate({name: self.project(x, token, ids, name, masks) for name in names})
        self.add_bias(pairs, ids)
        return self.activate(pairs)


def apply_layout(model: nn.Module, layout: dict) -> None:
    """Replaces the modules that the layout names; their tensors are empty."""
    for path, projections in layout["experts"].items():
        model.set_submodule(path, FactorizedExperts(model.get_submodule(path), projections))
    for path, quant in layout["linears"].items():
        old = model.get_submodule(path)
        kind = dict(dtype=old.weight.dtype, device=old.weight.device)
        new = PackedLinear(old.in_features, old.out_features, old.bias is not None, quant, **kind)
        model.set_submodule(path, new)


class MoesvdConfig(PreTrainedConfig):
    """The native config plus `moesvd` (the layout). Instances are of a subclass of the native class as well."""

    model_type = "moesvd"

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        layout = config_dict.get("moesvd")
        if not isinstance(layout, dict) or layout.get("format") != FORMAT:
            found = layout.get("format") if isinstance(layout, dict) else layout
            raise ValueError(f"config.json: moesvd.format is {found!r}, this version reads {FORMAT}")
        native = config_class(layout["native_type"])
        return super(MoesvdConfig, native).from_dict(config_dict | {"model_type": "moesvd"}, **kwargs)


@lru_cache
def config_class(native_type: str) -> Any:
    body = {"model_type": "moesvd", "__module__": __name__}
    made = type("MoesvdConfig", (MoesvdConfig, CONFIG_MAPPING[native_type]), body)
    AutoModelForCausalLM.register(made, MoesvdForCausalLM, exist_ok=True)
    return made


def native_class(config_type: Any) -> Any:
    """The class that predicts text: of a composite (vision-language) config the whole model. KeyError for none."""
    mappings = [MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING]
    if "text_config" in config_type.sub_configs:
        mappings.reverse()
    return next((m[config_type] for m in mappings if config_type in m), None) or mappings[0][config_type]


@lru_cache
def model_class(native_type: str) -> Any:
    """A subclass of the architecture's causal model whose modules follow `config.moesvd`."""
    native = native_class(CONFIG_MAPPING[native_type])

    def __init__(self, config, *args, **kwargs):
        native.__init__(self, config, *args, **kwargs)
        apply_layout(self, config.moesvd)

    def save_pretrained(self, save_directory, *args, **kwargs):
        self.config.architectures = ["MoesvdForCausalLM"]
        native.save_pretrained(self, save_directory, *args, **kwargs)
        finish_folder(Path(save_directory))

    body = {
        "__init__": __init__,
        "save_pretrained": save_pretrained,
        "config_class": config_class(native_type),
        "__module__": __name__,
    }
    return type("Moesvd" + native.__name__, (native,), body)


class MoesvdForCausalLM:
    """Entry point for AutoModelForCausalLM: builds the model class of the checkpoint's architecture."""

    config_class = MoesvdConfig

    @classmethod
    def from_pretrained(cls, folder, *args, config=None, output_loading_info=False, **kwargs):
        check_digests(Path(folder))
        config = config or AutoConfig.from_pretrained(folder, **kwargs)
        made = model_class(config.moesvd["native_type"])
        model, info = made.from_pretrained(folder, *args, config=config, output_loading_info=True, **kwargs)
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
            if found := info.get(kind):
                raise ValueError(f"{folder}: {kind.replace('_', ' ')}: {sorted(map(str, found))[:5]}")
        return (model, info) if output_loading_info else model

    @classmethod
    def _from_config(cls, config, **kwargs):
        return model_class(config.moesvd["native_type"])._from_config(config, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModelForCausalLM"):
        """transformers asks this of remote code; saving is taken care of by `save_pretrained`."""


def file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_digests(folder: Path) -> None:
    """Raises ValueError where a weight file of the folder is not the one its manifest names."""
    if not (folder / MANIFEST).is_file():
        return
    manifest = json.loads((folder / MANIFEST).read_text())
    for name, digest in manifest["digests"].items():
        path = folder / Path(name).name
        if not path.is_file():
            raise ValueError(f"{path}: missing; the checkpoint is incomplete, copy it again")
        if file_digest(path) != digest:
            raise ValueError(f"{path}: damaged (sha256 differs from {MANIFEST}); copy the checkpoint again")


def finish_folder(folder: Path) -> None:
    """Adds what makes a saved folder open again: these files, `auto_map`, and the digests of its weights."""
    for name in SHIPPED:
        source, target = Path(__file__).resolve().parent / name, folder.resolve() / name
        if source != target:
            shutil.copyfile(source, target)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "modeling_moesvd.MoesvdConfig",
        "AutoModelForCausalLM": "modeling_moesvd.MoesvdForCausalLM",
    }
    config["architectures"] = ["MoesvdForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    digests = {path.name: file_digest(path) for path in sorted(folder.glob("*.safetensors"))}
    manifest = folder / MANIFEST
    content = json.loads(manifest.read_text()) if manifest.is_file() else {}
    manifest.write_text(json.dumps(content | {"digests": digests}, indent=1, sort_keys=True) + "\n")


AutoConfig.register("moesvd", MoesvdConfig, exist_ok=True)
