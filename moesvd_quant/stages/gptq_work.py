"""The work of stage `gptq`."""

import torch

from ..calibration.recording import is_known, linear_gram
from ..checkpoint.layout import layout_of, projections_of
from ..decompose.whitening import whitened_error
from ..model.experts import find_experts, find_linears, left_over, shapes_of
from ..model.remaining import is_gone, sources_of
from ..planning.allocation import named, plain_storage, plan_budget
from ..planning.context import UNREACHED, Context, Plan, StageError, require_experts, weak_experts
from ..quantize.codec import Bank, Codecs
from ..quantize.registry import FLOAT, Storage
from ..runtime.formats import Format
from ..runtime.parts import LinearLayout, Projections
from ..runtime.stored import StoredLinear
from .gptq import Gptq
from .gptq_experts import quantize, quantize_experts
from .inputs import inputs_of, require_originals


def plan(context: Context, options: Gptq) -> Plan:
    """The parent's layout with every bank of every expert, and the other linears, packed."""
    parent = context.parent
    require_experts(parent)
    if options.error_aware:
        require_originals(parent)
    made = (
        plan_budget(context, ranks=False)
        if options.needs_budget() and not context.storages
        else Plan(layout_of(parent))
    )
    storages, layout, kept = context.storages or made.storages, made.layout, {}
    codec = options.codec()
    other = plain_storage(options, context.limits, codec)
    for layer, name in zip(parent.layers, parent.layer_names):
        for path, experts in find_experts(layer):
            full = f"{name}.{path}"
            parts = layout.experts.setdefault(full, projections_of(experts))
            _pack_experts(parts, shapes_of(experts), full, codec, other, storages.get(full))
        for path, linear in find_linears(layer):
            full = f"{name}.{path}"
            if isinstance(linear, StoredLinear):
                raise StageError(f"{full}: is {linear.layout.form.state} already")
            if not options.attention:
                kept[full] = "attention: false"
            elif linear.out_features < 16:
                kept[full] = f"only {linear.out_features} output features"
            else:
                layout.linears[full] = LinearLayout(_form(codec, other, linear.in_features, full))
        kept |= {f"{name}.{path}": why for path, why in left_over(layer)}
    if options.lm_head:
        head = parent.model.lm_head
        if parent.is_tied("lm_head.weight"):
            raise StageError("lm_head: is tied to the embeddings of this model and cannot be quantized alone")
        layout.linears["lm_head"] = LinearLayout(_form(codec, other, head.in_features, "lm_head"))
    for full, projections in storages.items():
        for name, how in projections.items():
            if FLOAT in how:
                kept[f"{full}.{name}"] = "the budget left some of its experts as they are"
    if kept:
        made.notes["kept in 16 bit"] = kept
    return made


def _form(codec: Codecs, storage: Storage, columns: int, where: str, bank: Bank = "dense", pruned=False) -> Format:
    with named(where):
        return codec.form(storage, columns, bank, pruned)


def _pack_experts(
    layout: Projections, shapes: dict, full: str, codec: Codecs, plain: Storage, storages: dict | None
) -> None:
    """Sets how each bank of an experts module is stored; storages: {projection: of each part}, `plain` without."""
    for name, parts in layout.items():
        for i, part in enumerate(parts):
            if part.packed:
                state = next(form.state for form in part.formats.values() if form.packed)
                raise StageError(f"{full}.{name}: is {state} already")
            storage = storages[name][i] if storages else plain
            if storage == FLOAT:  # the budget left it as it is
                continue
            for bank, (_, columns) in part.sizes(*shapes[name]).items():
                pruned = part.columns is not None
                part.formats[bank] = _form(codec, storage, columns, f"{full}.{name}", bank, pruned)


def run_layer(context: Context, options: Gptq, index: int, layer, statistics: dict, plan: Plan) -> dict:
    """Packs a loaded layer as planned. Returns the error of every matrix."""
    name = context.parent.layer_names[index]
    report: dict = {}
    codec = options.codec()
    walk = context.paired_walk() if options.error_aware else None
    if walk:
        walk.enter()
    for path, linear in list(find_linears(layer)):
        full = f"{name}.{path}"
        if full not in plan.layout.linears:
            continue
        if is_known(statistics, path):
            gram = linear_gram(statistics, path).to(context.device)
        else:  # never called, only its weight is read: rounding to nearest is what remains
            gram = torch.eye(linear.in_features, device=context.device)
            report[f"{full} (calibration)"] = UNREACHED
        made, error = _quantize_linear(codec, full, linear, gram, plan.layout.linears[full])
        layer.set_submodule(path, made)
        if walk:
            walk.replace(path, made)
        report[full] = error
    for path, experts in list(find_experts(layer)):
        full = f"{name}.{path}"
        if is_gone(experts):
            continue
        given = inputs_of(context, options.error_aware, experts, statistics, path)
        made = quantize_experts(codec, context.seed, full, experts, given, plan.layout.experts[full])
        layer.set_submodule(path, made)
        if walk:
            walk.replace(path, made)
        report[full] = given.errors(made) | {"weak_experts": weak_experts(statistics, path, sources_of(experts))}
    return report


def run_outer(context: Context, options: Gptq, plan: Plan) -> dict:
    """lm_head, where it was asked for; the outer tensors of the parent are loaded."""
    if "lm_head" not in plan.layout.linears:
        return {}
    model, gram = context.parent.model, context.statistics.outer()
    made, error = _quantize_linear(options.codec(), "lm_head", model.lm_head, gram, plan.layout.linears["lm_head"])
    model.set_submodule("lm_head", made)
    return {"lm_head": error}


def _quantize_linear(codec: Codecs, where: str, linear, gram, layout: LinearLayout) -> tuple[StoredLinear, float]:
    packed = quantize(codec, where, linear.weight, gram, layout.form)
    made = StoredLinear.in_place_of(linear, layout, packed.tensors)
    return made, whitened_error(linear.weight, packed.dense(), gram)
