"""The work of stage `drop`."""

import torch
import torch.nn.functional as F
from torch import nn

from ..calibration.store import Statistics
from ..checkpoint.layout import layout_of
from ..model.experts import find_experts, find_linears, flags_of, shapes_of, shared_beside
from ..planning.context import Context, Plan, Progress, StageError, require_experts
from ..runtime.factorized_experts import FactorizedExperts
from ..runtime.native_experts import SharedExpert
from .drop import Drop


def plan(context: Context, options: Drop) -> Plan:
    """Which MoE layers go: of those whose hidden states with and without their MLP are most alike (MoE-Compression's
    layer drop, He et al. 2024, norm included)."""
    require_experts(context.parent)
    layers = list(zip(context.parent.layers, context.parent.layer_names))
    found = {name: _experts(layer, name) for layer, name in layers if any(True for _ in find_experts(layer))}
    if options.layers >= len(found):
        raise StageError(f"drop.layers {options.layers}: the model has {len(found)} MoE layers, and one has to stay")

    def make() -> dict[str, torch.Tensor]:
        return {"similarity": similarities(context.statistics, context.surveyed)}

    similarity = context.statistics.kept("similarity", make)["similarity"]
    alike = {name: float(value) for (_, name), value in zip(layers, similarity) if name in found}
    gone = sorted(alike, key=lambda name: -alike[name])[: options.layers]
    layout = layout_of(context.parent)
    for name in gone:
        layout.experts |= {f"{name}.{path}": {key: [] for key in shapes} for path, shapes in found[name].items()}
    decisions = {name: {"similarity": value, "dropped": name in gone} for name, value in alike.items()}
    return Plan(layout, decisions)


def _experts(layer: nn.Module, name: str) -> dict[str, dict[str, tuple[int, int]]]:
    """Shapes of all that makes up the MLP of an MoE layer, shared experts included, {path: {projection: (out, in)}}.
    StageError where something of it would go on giving outputs."""
    modules = dict(find_experts(layer))
    for path, experts in modules.items():
        if flags_of(experts).has_bias:
            raise StageError(f"{name}.{path}: experts with biases give something without weights: cannot be dropped")
    homes = tuple(path.rpartition(".")[0] + "." for path in modules)
    found = {path: shapes_of(experts) for path, experts in modules.items()}
    for path, shared in shared_beside(layer):
        weights = SharedExpert.weights(shared)
        found[path] = {key: (weight.shape[1], weight.shape[2]) for key, weight in weights.items()}
    known = tuple(f"{path}." for path in found)
    for path, _ in find_linears(layer):
        if path.startswith(homes) and not path.startswith(known):
            raise StageError(f"{name}.{path}: beside the experts and no plain MLP: its layer cannot be dropped")
    return found


@torch.no_grad()
def similarities(known: Statistics, report: Progress) -> torch.Tensor:
    """(layers,) float64: mean over tokens of the cosine between a layer's hidden states with and without its MLP, which
    are those after it and those before its norm; minus infinity for a layer without experts."""
    found = torch.full((known.count,), -torch.inf, dtype=torch.float64)
    for visit in known.model().walk(known.windows, known.batch_size, known.scratch(known.all_hidden(3))):
        after = visit.outputs()
        if any(True for _ in find_experts(visit.layer)):
            empty(visit.layer, _experts(visit.layer, f"layer {visit.index}"))
            before = visit.run(visit.hidden)
            cosines = [F.cosine_similarity(one.float(), two.float(), dim=-1) for one, two in zip(before, after)]
            found[visit.index] = torch.cat([part.flatten() for part in cosines]).double().mean()
        report(visit.index + 1, known.count)
    return found


def empty(layer: nn.Module, modules: dict) -> None:
    """Puts experts without weights, which give zeros, at these paths."""
    for path, shapes in modules.items():
        native = layer.get_submodule(path)
        if not isinstance(native, FactorizedExperts):
            native.is_expert = True  # a shared one is an expert from now on
            layer.set_submodule(path, FactorizedExperts(native, {name: [] for name in shapes}))


def run_layer(context: Context, index: int, layer, plan: Plan) -> dict:
    """Takes the experts out of a layer that is dropped."""
    start = context.parent.layer_names[index] + "."
    own = {path.removeprefix(start): parts for path, parts in plan.layout.experts.items() if path.startswith(start)}
    empty(layer, own)
    return {}
