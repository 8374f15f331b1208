"""The work of stage `losparse`."""

import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from ..calibration.metric import shrink, unknown
from ..checkpoint.layout import factor_part, layout_of
from ..decompose.losparse import rank_for, split
from ..healing.adapters import update_file
from ..healing.needs import healing_needs
from ..healing.record import write_curve
from ..healing.rows import RowPruning
from ..healing.whole import heal_whole
from ..memory.files import write_json
from ..memory.lazy import LazySequence
from ..model.experts import dense_weight, expert_count, find_experts, shapes_of
from ..model.remaining import is_gone, members_of
from ..planning.context import (
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
from ..runtime.factorized_experts import FactorizedExperts
from ..runtime.parts import DensePart, Layout, Part, Projections
from ..runtime.sparse import SparseRows, pack_rows
from .lora import TRAINING
from .lora_work import free_memory, require_recomputable
from .losparse import LoSparse, moments_of, training_of

RECORD = "losparse.json"


def plan(context: Context, options: LoSparse) -> Plan:
    """Factors and rests, the rows of each rest alike; which matrix keeps how many is known when they are trained."""
    require_experts(context.parent)
    training = training_of(options)
    require_recomputable(context, training)
    trained = _layout(context, options, lambda rests, shape: [rests])
    needs = healing_needs(context.parent, trained, training, context.training.train.shape, context.statistics)
    needs.require(free_memory(context), context.statistics.store, training)

    def alike(rests: DensePart, shape: tuple[int, int]) -> list[Part]:
        rests.formats["dense"] = SparseRows(int(options.rest * shape[0]))
        return [rests]

    return Plan(_layout(context, options, alike), notes={"needs": needs.to_dict()})


def _layout(context: Context, options: LoSparse, rests_as) -> Layout:
    """Layout of all experts: rests_as(part of whole rests, shape) are the parts of a projection's rests. Experts that
    share a matrix share all of it. StageError for what is compressed already."""
    layout = layout_of(context.parent)
    for layer, name in zip(context.parent.layers, context.parent.layer_names):
        for path, experts in find_experts(layer):
            if is_gone(experts):
                continue
            made: Projections = {}
            for projection, shape in shapes_of(experts).items():
                whole = _matrices(experts, projection, f"{name}.{path}")
                rank = rank_for(shape, options.low_rank)
                factors = factor_part(list(whole.experts), rank, list(whole.dense), list(whole.dense))
                made[projection] = [*rests_as(whole, shape), factors]
            layout.experts[f"{name}.{path}"] = made
    return layout


def _matrices(experts: nn.Module, projection: str, where: str) -> DensePart:
    """Which whole matrix each expert has."""
    if not isinstance(experts, FactorizedExperts):
        everyone = list(range(expert_count(experts)))
        return DensePart(everyone, list(everyone))
    parts = experts.layout[projection]
    if len(parts) != 1 or not isinstance(parts[0], DensePart) or parts[0].packed or parts[0].rows or parts[0].columns:
        raise StageError(f"{where}: is factorized, cut or packed already; losparse takes whole matrices")
    return DensePart(list(parts[0].experts), list(parts[0].dense))


def prepare(context: Context, options: LoSparse, folder: Path) -> Plan:
    """Trains, once; state and result lie in folder/training. The plan has the rows that are left then."""
    training, record, state = training_of(options), folder / RECORD, folder / TRAINING
    if not record.is_file():
        state.mkdir(exist_ok=True)
        first, done = moments_of(options)

        def prune(tensors: dict[str, nn.Parameter]) -> RowPruning:
            rests = {name: bank for name, bank in tensors.items() if name.endswith("_dense")}
            return RowPruning(rests, first, done, options.rest)

        trained = _layout(context, options, lambda rests, shape: [rests])
        history, _ = heal_whole(context, training, trained, state, _into_parts, prune)
        write_curve(folder, history, "training loss, nats per token")
        found = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
        step, loss = min((pair for pair in found if pair[0] >= done), key=lambda pair: pair[1])
        outcome = {"validation_perplexity_before": math.exp(found[0][1])}
        write_json(record, outcome | {"validation_perplexity_after": math.exp(loss), "step": step})
    layout = _layout(context, options, lambda rests, shape: [rests])
    for index, name in enumerate(context.parent.layer_names):
        tensors = load_file(update_file(state, index))
        for path, parts in layout.experts.items():
            if path.startswith(f"{name}."):
                for projection, (rests, factors) in parts.items():
                    assert isinstance(rests, DensePart)
                    kept = _rows(tensors, path, projection).sum(-1).tolist()
                    parts[projection] = [*_rest_parts(rests, kept), factors]
    return Plan(layout, notes={"losparse": json.loads(record.read_text())})


def _rows(tensors: dict[str, torch.Tensor], path: str, projection: str) -> torch.Tensor:
    """(matrices, rows) bool: the rows of the rests that are left."""
    return tensors[f"put/{path}.{projection}_0_dense"].ne(0).any(-1)


def _rest_parts(rests: DensePart, kept: list[int]) -> list[Part]:
    """A part for all matrices that keep the same number of rows, as a bank has one size; none where all rows went."""
    parts: list[Part] = []
    for count in sorted(set(kept) - {0}, reverse=True):
        matrices = [matrix for matrix, own in enumerate(kept) if own == count]
        users = [(e, matrices.index(m)) for e, m in zip(rests.experts, rests.dense) if m in matrices]
        experts, rows = (list(column) for column in zip(*users))
        parts.append(DensePart(experts, rows, formats={"dense": SparseRows(count)}))
    return parts


def _into_parts(layer: nn.Module, name: str, layout: Layout, dtype: torch.dtype, seed: int) -> list[str]:
    """Splits the experts of a loaded layer in place, as `terms.into_layout` adds terms; nothing of it is new."""
    for path, experts in list(find_experts(layer)):
        if parts := layout.experts.get(f"{name}.{path}"):
            layer.set_submodule(path, factorized(experts, parts, _split_banks(experts, parts)))
    layer.requires_grad_(False)
    return []


def _split_banks(experts: nn.Module, layout: Projections) -> Iterator[tuple[str, int | None, torch.Tensor]]:
    for projection, (rests, factors) in layout.items():
        for matrix in range(max(rests.users("dense")) + 1):
            weight = dense_weight(experts, projection, rests.experts[rests.users("dense").index(matrix)])
            left, right, rest = split(weight, factors.rank or 0)
            yield f"{projection}_0_dense", matrix, rest
            yield f"{projection}_1_left", matrix, left
            yield f"{projection}_1_right", matrix, right


def run_layer(context: Context, index: int, layer: nn.Module, statistics: dict, plan: Plan) -> dict:
    """Puts what was trained in the place of a loaded layer's experts. Returns errors per projection and expert."""
    tensors, report = load_file(update_file(context.folder / TRAINING, index)), {}
    for path, native in list(find_experts(layer)):
        full = f"{context.parent.layer_names[index]}.{path}"
        if full not in plan.layout.experts:
            continue
        sources, parts = members_of(native), plan.layout.experts[full]
        metric = shrink if reached(statistics, path) else unknown
        grams = expert_grams(statistics, path, context.device, metric, sources)
        weights = {p: LazySequence(expert_count(native), partial(dense_weight, native, p)) for p in parts}
        made = factorized(native, parts, (), getattr(native, "sources", None))
        for projection, of_projection in parts.items():
            _fill(made, projection, of_projection, tensors, full)
        layer.set_submodule(path, made)
        report[full] = errors_of(made, weights, grams) | {"weak_experts": weak_experts(statistics, path, sources)}
    return report


@torch.no_grad()
def _fill(made: FactorizedExperts, projection: str, parts: list[Part], tensors: dict, full: str) -> None:
    """Sets the rests and the factors of a projection; the factors say which matrix of the trained an expert has."""
    *rests, factors = parts
    trained = {bank: tensors[f"put/{full}.{projection}_{bank}"] for bank in ("0_dense", "1_left", "1_right")}
    for side in ("left", "right"):
        getattr(made, f"{projection}_{len(rests)}_{side}").copy_(trained[f"1_{side}"])
    rows, matrix_of = _rows(tensors, full, projection), dict(zip(factors.experts, factors.users("left")))
    for i, part in enumerate(rests):
        for expert, row in zip(part.experts, part.users("dense")):
            matrix = matrix_of[expert]
            packed = pack_rows(trained["0_dense"][matrix], rows[matrix])
            for kind, bank in made.bank_tensors(f"{projection}_{i}_dense", row).items():
                bank.copy_(packed[kind])
