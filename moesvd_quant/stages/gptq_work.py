"""The work of stage `gptq`."""

import hashlib
from collections.abc import Callable, Iterator
from functools import partial

import torch

from ..allocate import FLOAT
from ..calibration.recording import linear_gram
from ..decompose.whitening import whitened_error
from ..layout import layout_of, projections_of
from ..lazy import Lazily, picked
from ..model.experts import dense_weight, find_experts, find_linears, left_over, shapes_of
from ..model.factorized_experts import FactorizedExperts
from ..model.packing import PackedLinear
from ..model.parts import part_banks
from ..quantize.factors import quantize_factors
from ..quantize.gptq import with_damp
from ..quantize.packed import PackedMatrix, QuantizeError, Quantizer, quant_format, round_to_nearest
from .allocation import plan_budget
from .context import UNREACHED, Context, Plan, StageError, factorized, require_experts, weak_experts
from .gptq import Gptq
from .inputs import inputs_of

OTHER_BITS = 4  # of linears outside the experts, where a budget decides about the experts


def plan(context: Context, options: Gptq) -> Plan:
    """The parent's layout with every bank of every expert, and the other linears, packed."""
    parent = context.parent
    require_experts(parent)
    made = plan_budget(context, ranks=False) if options.is_open() and not context.widths else Plan(layout_of(parent))
    widths, layout, kept = context.widths or made.widths, made.layout, {}
    for layer, name in zip(parent.layers, parent.layer_names):
        for path, experts in find_experts(layer):
            full = f"{name}.{path}"
            parts = layout["experts"].setdefault(full, projections_of(experts))
            _pack_experts(parts, shapes_of(experts), full, options, widths.get(full))
        for path, linear in find_linears(layer):
            full = f"{name}.{path}"
            if isinstance(linear, PackedLinear):
                raise StageError(f"{full}: is quantized already")
            if not options.attention:
                kept[full] = "attention: false"
            elif linear.out_features < 16:
                kept[full] = f"only {linear.out_features} output features"
            else:
                layout["linears"][full] = _quant(options, linear.in_features, full)
        kept |= {f"{name}.{path}": why for path, why in left_over(layer)}
    if options.lm_head:
        head = parent.model.lm_head
        if "lm_head.weight" in (getattr(parent.model, "all_tied_weights_keys", None) or {}):
            raise StageError("lm_head: is tied to the embeddings of this model and cannot be quantized alone")
        layout["linears"]["lm_head"] = _quant(options, head.in_features, "lm_head")
    for full, projections in widths.items():
        for name, bits in projections.items():
            if FLOAT in bits:
                kept[f"{full}.{name}"] = "the budget left some of its experts as they are"
    if kept:
        made.notes["kept in 16 bit"] = kept
    return made


def _quant(options: Gptq, columns: int, where: str, rank_axis: bool = False, bits: int | None = None) -> dict:
    try:
        return quant_format(options, columns, rank_axis, bits or options.bits or OTHER_BITS)
    except QuantizeError as error:
        raise StageError(f"{where}: {error}") from error


def _pack_experts(layout: dict, shapes: dict, full: str, options, widths: dict | None) -> None:
    """Sets how each bank of an experts module is packed; widths: {projection: bits of each part}."""
    for name, parts in layout.items():
        for i, part in enumerate(parts):
            if part["quant"]:
                raise StageError(f"{full}.{name}: is quantized already")
            bits = widths[name][i] if widths else None
            if bits == FLOAT:  # the budget left it as it is
                continue
            part["quant"] = {
                bank: _quant(options, shape[-1], f"{full}.{name}", bank == "left" or "columns" in part, bits)
                for bank, shape in part_banks(part, *shapes[name]).items()
            }


def run_layer(context: Context, options: Gptq, index: int, layer, statistics: dict, plan: Plan) -> dict:
    """Packs a loaded layer as planned. Returns the error of every matrix."""
    name = context.parent.layer_names[index]
    report: dict = {}
    walk = context.paired_walk() if options.error_aware else None
    if walk:
        walk.enter()
    for path, linear in list(find_linears(layer)):
        full = f"{name}.{path}"
        if full not in plan.layout["linears"]:
            continue
        if f"{path}/gram" in statistics or f"{path}/alias" in statistics:
            gram = linear_gram(statistics, path).to(context.device)
        else:  # never called, only its weight is read: rounding to nearest is what remains
            gram = torch.eye(linear.in_features, device=context.device)
            report[f"{full} (calibration)"] = UNREACHED
        made, error = _quantize_linear(options, full, linear, gram, plan.layout["linears"][full])
        layer.set_submodule(path, made)
        if walk:
            walk.replace(path, made)
        report[full] = error
    for path, experts in list(find_experts(layer)):
        full = f"{name}.{path}"
        given = inputs_of(context, options.error_aware, experts, statistics, path)
        made = _quantize_experts(options, context.seed, full, experts, given, plan.layout["experts"][full])
        layer.set_submodule(path, made)
        if walk:
            walk.replace(path, made)
        report[full] = given.errors(made) | {"weak_experts": weak_experts(statistics, path)}
    return report


def run_outer(context: Context, options: Gptq, plan: Plan) -> dict:
    """lm_head, where it was asked for; the outer tensors of the parent are loaded."""
    if "lm_head" not in plan.layout["linears"]:
        return {}
    model, gram = context.parent.model, context.statistics.outer()
    made, error = _quantize_linear(options, "lm_head", model.lm_head, gram, plan.layout["linears"]["lm_head"])
    model.set_submodule("lm_head", made)
    return {"lm_head": error}


def _quantizer(options: Gptq, where: str) -> Quantizer:
    """The stage's; what goes wrong is a StageError that names `where`."""
    rounding = Quantizer(lambda gram: None, lambda weight, inputs, quant: round_to_nearest(weight, quant))
    steps = rounding if options.rtn else with_damp(options.damp)
    return Quantizer(*(partial(_named, where, step) for step in steps))


def _named(where: str, step: Callable, *given):
    try:
        return step(*given)
    except (QuantizeError, RuntimeError) as error:
        raise StageError(f"{where}: {error}") from error


def _quantize(options: Gptq, where: str, weight, gram, quant) -> PackedMatrix:
    quantizer = _quantizer(options, where)
    return quantizer.pack(weight, quantizer.inputs(gram), quant)


def _quantize_linear(options, where, linear, gram, quant):
    packed = _quantize(options, where, linear.weight, gram, quant)
    kind = dict(dtype=linear.weight.dtype, device=linear.weight.device)
    made = PackedLinear(linear.in_features, linear.out_features, linear.bias is not None, quant, **kind)
    _fill(made, "weight", [packed], stacked=False)
    if linear.bias is not None:
        made.bias = linear.bias
    return made, whitened_error(linear.weight, packed.dense(), gram)


def _quantize_experts(options, seed, full, experts, given, layout) -> FactorizedExperts:
    """The packed experts module."""
    module = factorized(experts, layout, _floats(experts, layout))
    for name in sorted(layout, key=lambda name: name == "down"):  # whose inputs the others decide
        # A part after another one of the same experts (a delta after its base) stands for what that one left over.
        done: list[tuple[dict, dict]] = []
        targets = _targets(experts, given.weights(name, module), done)
        for i, part in enumerate(layout[name]):
            if not part["quant"]:
                continue
            made = _quantize_part(
                options, seed, full, name, i, part, experts, targets, given.grams(name, "left" in part)
            )
            for bank, packed in made.items():
                _fill(module, f"{name}_{i}_{bank}", packed, stacked=True)
            done.append((part, made))
    return module


def _floats(experts, layout) -> Iterator[tuple[str, int | None, torch.Tensor]]:
    """(bank, row or None for all, tensor) of the parts that the plan leaves in floating point, as they are."""
    for name, parts in layout.items():
        for i, part in enumerate(parts):
            if part["quant"]:
                continue
            if isinstance(experts, FactorizedExperts):
                keys = [f"{name}_{i}_{bank}" for bank in part_banks(part, *experts.shapes[name])]
                yield from ((key, None, getattr(experts, key)) for key in keys)
            else:
                rows = zip(part["dense"], part["experts"])
                yield from ((f"{name}_{i}_dense", row, dense_weight(experts, name, expert)) for row, expert in rows)


def _targets(experts, wanted: Lazily, done: list[tuple[dict, dict]]) -> Lazily:
    """What the parts that are packed when it is asked for (part, its banks) leave of each expert's weight."""

    def left_over(expert: int) -> torch.Tensor:
        weight = wanted[expert]
        for part, made in done:
            if expert in part["experts"]:
                weight = weight - _product(experts, part, made, part["experts"].index(expert)).to(weight)
        return weight

    return Lazily(len(wanted), left_over)


def _product(experts, part: dict, made: dict, at: int) -> torch.Tensor:
    """What a packed part of an experts module contributes to its expert number `at`."""
    if "dense" in part:
        dense = made["dense"][part["dense"][at]].dense()
        return experts.spread(part, dense) if "rows" in part or "columns" in part else dense
    return made["left"][part["left"][at]].dense() @ made["right"][part["right"][at]].dense()


def _quantize_part(options, seed, full, name, i, part, experts, targets, grams):
    """Packed banks of one part: {"dense": [...]} or {"left": [...], "right": [...]}."""
    users = part["experts"]
    if "dense" in part:
        packed = []
        for row in range(max(part["dense"]) + 1):
            sharers = [e for e, r in zip(users, part["dense"]) if r == row]
            where = f"{full}.{name}[{', '.join(map(str, sharers))}]"
            whole = len(sharers) == 1 and "rows" not in part and "columns" not in part
            weight = targets[sharers[0]] if whole else experts.bank(name, i, "dense", torch.float32, row)
            gram = sum(grams[e] for e in sharers)
            if "columns" in part:
                kept = experts.channels.long()
                gram = gram[kept][:, kept]
            packed.append(_quantize(options, where, weight, gram, part["quant"]["dense"]))
        return {"dense": packed}
    lefts, rights = quantize_factors(
        picked(targets, users),
        picked(grams, users),
        Lazily(max(part["left"]) + 1, lambda row: experts.bank(name, i, "left", torch.float64, row)),
        Lazily(max(part["right"]) + 1, lambda row: experts.bank(name, i, "right", torch.float64, row)),
        part["left"],
        part["right"],
        part["quant"],
        _quantizer(options, f"{full}.{name}"),
        _seed(seed, full, name, i),
    )
    return {"left": lefts, "right": rights}


def _fill(module, key: str, packed: list[PackedMatrix], stacked: bool) -> None:
    for kind in packed[0].tensors:
        values = [p.tensors[kind] for p in packed]
        with torch.no_grad():
            module._parameters[f"{key}_{kind}"].copy_(torch.stack(values) if stacked else values[0])


def _seed(seed: int, *where) -> int:
    return int.from_bytes(hashlib.sha256(repr((seed, where)).encode()).digest()[:4], "little")
