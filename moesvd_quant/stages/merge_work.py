"""The work of stage `merge`."""

from pathlib import Path

from safetensors.torch import load_file

from ..calibration.routing import scorer_of
from ..checkpoint.layout import dense_layout, layout_of
from ..memory.files import write_tensors
from ..model.experts import find_experts, flags_of
from ..planning.context import UNREACHED, Context, Plan, StageError, require_experts
from ..runtime.modeling_moesvd import replace_experts
from .candidates import Candidate, candidates_of, require_servable
from .merge import MERGES, MERGING, Merge
from .merges import Merges, merged, merges_of, rows_layout


def plan(context: Context, options: Merge) -> Plan:
    """Which experts of each layer are merged, and their matrices."""
    require_experts(context.parent)
    candidates = candidates_of(context.parent, "merged")
    for one in candidates:
        _require_mergeable(one, options)
    tensors = merges_of(context, options, candidates)
    layout, decisions, unreached = layout_of(context.parent), {}, {}
    for one in candidates:
        if f"{one.full}/leader" not in tensors:
            unreached[one.full] = UNREACHED
            continue
        merges = Merges.of(tensors, one.full)
        if options.method == "ream":
            layout.sources[one.full] = merges.groups
            layout.experts[one.full] = dense_layout(len(merges.groups), one.shapes)
        else:
            layout.experts[one.full] = rows_layout(one.shapes, merges.groups)
        decisions[one.full] = {"groups": merges.groups, "shares": merges.share.tolist()}
    if not decisions:
        raise StageError("no calibration token reached any expert; give other calibration text")
    return Plan(layout, decisions, {"kept whole": unreached} if unreached else {})


def _require_mergeable(one: Candidate, options: Merge) -> None:
    """Before any walk: StageError where experts, or their router, cannot be merged."""
    if flags_of(one.experts).has_bias:
        raise StageError(f"{one.full}: experts with biases cannot be merged; use prune")
    if scorer_of(one.block, one.experts) is None:
        raise StageError(f"{one.full}: cannot be merged: no module of its router has a weight row for each expert")
    if options.method == "ream":
        require_servable(one, one.first(options.ratio), "merge")
        if (left := one.left(options.ratio)) * options.group_size < one.count:
            raise StageError(
                f"{one.full}: merge.group_size {options.group_size}: {left} groups of at most {options.group_size} "
                f"experts cannot hold {one.count}; raise it"
            )


def prepare(context: Context, options: Merge, plan: Plan, folder: Path) -> Plan:
    """Puts what was decided where each layer finds it."""
    (folder / MERGING).mkdir(exist_ok=True)
    write_tensors(folder / MERGES, merges_of(context, options, candidates_of(context.parent, "merged")))
    return plan


def run_layer(context: Context, index: int, layer, plan: Plan) -> dict:
    """Puts merged experts in the place of all."""
    tensors = load_file(context.folder / MERGES)
    for path, native in list(find_experts(layer)):
        full = f"{context.parent.layer_names[index]}.{path}"
        if full in plan.decisions:
            merges = Merges.of(tensors, full)
            made = merged(native, merges, plan.layout.experts[full], plan.layout.sources.get(full))
            replace_experts(layer, path, made)
    return {}
