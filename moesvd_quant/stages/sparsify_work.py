"""The work of stage `sparsify`."""

from dataclasses import replace
from functools import partial

import torch

from ..calibration.metric import shrink, unknown
from ..calibration.recording import is_known, linear_gram
from ..checkpoint.layout import layout_of, projections_of
from ..decompose.sensitivity import OWL_MULTIPLE, outlier_distribution
from ..decompose.sparsity import TWO_OF_FOUR, Pattern, owl_shares, wanda_kept, wanda_mask
from ..decompose.whitening import whitened_error
from ..memory.lazy import LazySequence
from ..model.experts import dense_weight, find_experts, find_linears, left_over, shapes_of
from ..model.remaining import is_gone, is_whole
from ..planning.context import (
    UNREACHED,
    Context,
    Plan,
    StageError,
    errors_of,
    expert_grams,
    factorized,
    reached,
    require_experts,
    weak_experts,
)
from ..quantize.codec import QuantizeError
from ..quantize.feedback import HessianFactor
from ..quantize.sparsegpt import sparsegpt, sparsegpt_kept
from ..runtime.parts import LinearLayout
from ..runtime.sparse import Sparse, pack_sparse
from ..runtime.stored import StoredLinear
from .paper_layers import weights_and_norms
from .sparsify import Sparsify


def plan(context: Context, options: Sparsify) -> Plan:
    """How many values of each matrix stay."""
    require_experts(context.parent)
    _require_whole(context)
    layout, kept, ratios = layout_of(context.parent), {}, _ratios(context, options)
    for layer, name in zip(context.parent.layers, context.parent.layer_names):
        pattern = _pattern(options, ratios[name])
        for path, experts in find_experts(layer):
            full = f"{name}.{path}"
            parts = layout.experts.setdefault(full, projections_of(experts))
            for projection, shape in shapes_of(experts).items():
                parts[projection][0].formats["dense"] = _form(options, shape, pattern, f"{full}.{projection}")
        for path, linear in find_linears(layer):
            full, shape = f"{name}.{path}", (linear.out_features, linear.in_features)
            if options.attention:
                layout.linears[full] = LinearLayout(_form(options, shape, pattern, full))
            else:
                kept[full] = "attention: false"
        kept |= {f"{name}.{path}": why for path, why in left_over(layer)}
    return Plan(layout, notes={"left out": ratios, "kept whole": kept})


def _require_whole(context: Context) -> None:
    """Before any walk: StageError where something is compressed already."""
    for layer, name in zip(context.parent.layers, context.parent.layer_names):
        for path, experts in find_experts(layer):
            if is_gone(experts) or not is_whole(experts):
                raise StageError(f"{name}.{path}: is changed already; sparsify takes the original's matrices")
        for path, linear in find_linears(layer):
            if isinstance(linear, StoredLinear):
                raise StageError(f"{name}.{path}: is {linear.layout.form.state} already")


def _form(options: Sparsify, shape: tuple[int, int], pattern: Pattern, where: str) -> Sparse:
    try:
        return Sparse((wanda_kept if options.method == "wanda" else sparsegpt_kept)(shape, pattern))
    except ValueError as error:
        raise StageError(f"{where}: {error}") from error


def _pattern(options: Sparsify, ratio: float) -> Pattern:
    return TWO_OF_FOUR if options.pattern == "2:4" else Pattern(ratio)


def _ratios(context: Context, options: Sparsify) -> dict[str, float]:
    """Which share of its weights goes, by the name of each layer."""
    names, ratio = context.parent.layer_names, TWO_OF_FOUR.ratio if options.ratio is None else options.ratio
    if options.layers == "uniform":
        return dict.fromkeys(names, ratio)
    reading = replace(context, parent=context.original or context.parent)
    found = {names[i]: own for i, own in reading.each_layer(partial(_outliers, options), context.surveyed) if own}
    scores, sizes = zip(*found.values())
    try:
        shares = owl_shares(scores, sizes, 1 - ratio)
    except ValueError as error:
        raise StageError(f"sparsify.layers: owl: {error}; give a ratio nearer to a half") from error
    return dict.fromkeys(names, ratio) | {name: 1 - share for name, share in zip(found, shares)}


def _outliers(options: Sparsify, context: Context, index: int, layer, statistics: dict) -> tuple[float, int] | None:
    """OWL's score of a layer of the original, over all that will be sparse, and how many weights that is; None where it
    is nothing."""
    pairs = [pair for path, experts in find_experts(layer) for pair in weights_and_norms(experts, statistics, path)]
    for path, linear in find_linears(layer) if options.attention else ():
        pairs.append((linear.weight, _linear_gram(statistics, path, linear).diagonal().sqrt()))
    if not pairs:
        return None
    weights, norms = zip(*pairs)
    return outlier_distribution(weights, norms, OWL_MULTIPLE), sum(weight.numel() for weight in weights)


def _linear_gram(statistics: dict, path: str, linear) -> torch.Tensor:
    """Gram matrix (in, in) of a linear; where the walk never reached it, all inputs count alike."""
    return linear_gram(statistics, path) if is_known(statistics, path) else torch.eye(linear.in_features)


@torch.no_grad()
def run_layer(context: Context, options: Sparsify, index: int, layer, plan: Plan) -> dict:
    """Leaves weights of a loaded layer out, by the inputs that it has where the layers before it are sparse. Returns
    the error of every matrix under these inputs."""
    name, walk, report = context.parent.layer_names[index], context.compressed_walk(), {}
    seen, pattern = walk.statistics(index), _pattern(options, plan.notes["left out"][name])
    for path, linear in list(find_linears(layer)) if options.attention else ():
        full = f"{name}.{path}"
        gram = _linear_gram(seen, path, linear).to(context.device)
        tensors = _sparse(options, full, linear.weight, gram, pattern)
        made = StoredLinear.in_place_of(linear, plan.layout.linears[full], tensors)
        layer.set_submodule(path, made)
        walk.replace(path, made)
        report[full] = whitened_error(linear.weight, made.dense_weight(), gram)
        if not is_known(seen, path):
            report[f"{full} (calibration)"] = UNREACHED
    for path, experts in list(find_experts(layer)):
        full = f"{name}.{path}"
        grams = expert_grams(seen, path, context.device, shrink if reached(seen, path) else unknown)
        made = factorized(experts, plan.layout.experts[full], ())
        weights = {p: LazySequence(made.experts, partial(dense_weight, experts, p)) for p in shapes_of(experts)}
        for projection, own in weights.items():
            for expert, weight in enumerate(own):
                where = f"{full}.{projection}[{expert}]"
                tensors = _sparse(options, where, weight, grams[projection][expert], pattern)
                for kind, bank in made.bank_tensors(f"{projection}_0_dense", expert).items():
                    bank.copy_(tensors[kind])
        layer.set_submodule(path, made)
        walk.replace(path, made)
        report[full] = errors_of(made, weights, grams) | {"weak_experts": weak_experts(seen, path)}
    return report


def _sparse(options: Sparsify, where: str, weight, gram, pattern: Pattern) -> dict[str, torch.Tensor]:
    """The tensors of `Sparse` of a weight (out, in) for inputs of this Gram matrix."""
    if options.method == "wanda":
        return pack_sparse(weight, wanda_mask(weight, gram.diagonal().sqrt(), pattern))
    try:
        return pack_sparse(*sparsegpt(weight, HessianFactor.in_place(gram, options.damp), pattern))
    except QuantizeError as error:
        raise StageError(f"{where}: {error}") from error
