"""The plan under a byte budget: one allocation of rank and bits over all experts of the model."""

from dataclasses import replace
from fnmatch import fnmatch
from functools import partial
from math import prod

import numpy as np

from ..allocate import DENSE, FLOAT, Choice, Table, allocate, least_cost
from ..fitting import describe, fit_table, group_weight, profile
from ..layout import layout_of, parts_by_choice
from ..model.experts import expert_count, find_experts, shapes_of, split_projections
from ..model.modeling_moesvd import FactorizedExperts
from ..quantize.gptq import QuantizeError, quant_format
from ..recipe import Limits
from .base import Context, Plan, StageError, expert_grams, reached, weak_experts

WIDTHS = [2, 3, 4, 8, FLOAT]


def plan_budget(context: Context, ranks: bool) -> Plan:
    """Ranks (where `ranks`) and widths of all experts within `context.budget` bytes and `context.limits`.

    Widths are those of the gptq stage (this one or one to come): its bits, or any of WIDTHS where they are open;
    without one, experts stay floating point.
    """
    options, limits = context.gptq, context.limits
    widths = [FLOAT] if options is None else limits.widths or WIDTHS if options.bits is None else [options.bits]
    everything, weak = choice_tables(context, widths, ranks)
    item, shapes = context.parent.stored_dtype.itemsize, _shapes(context)
    tables = {key: limited(table, ".".join(key), limits, prod(shapes[key]) * item) for key, table in everything.items()}
    ties = {key: key[0] for key, table in tables.items() if limits.one_width_per_layer and len(table.choices) > 1}
    try:
        made = allocate(tables, context.budget or least_cost(tables), ties)
    except ValueError as error:
        raise StageError(f"budget: {error}") from error
    decisions: dict = {"allocation": {"forecast": made.error, "bound": made.bound, "gap": made.gap}}
    for (path, name), choices in made.choices.items():
        decision = decisions.setdefault(path, {"weak_experts": weak[path], "choices": {}, "forecast": {}})
        decision["choices"][name] = [describe(choice) for choice in choices]
        decision["forecast"][name] = forecast_error(tables[path, name], choices)
    return plan_of(context, made.choices, decisions)


def plan_of(context: Context, choices: dict[tuple[str, str], list[Choice]], decisions: dict) -> Plan:
    """The plan in which each expert becomes what was chosen for it, by (path, projection)."""
    layout = layout_of(context.parent)
    bits: dict = {}
    for (path, name), chosen in choices.items():
        parts, part_bits = parts_by_choice(chosen)
        layout["experts"].setdefault(path, {})[name] = parts
        bits.setdefault(path, {})[name] = part_bits
    return Plan(layout, decisions, bits)


def forecast_error(table: Table, choices: list[Choice]) -> float:
    """What the choices of the experts of a group are forecast to cost together."""
    return float(sum(table.errors[expert, table.choices.index(choice)] for expert, choice in enumerate(choices)))


def _shapes(context: Context) -> dict[tuple[str, str], tuple[int, int]]:
    """(out, in) of the matrices of each projection of each experts module."""
    return {
        (f"{name}.{path}", projection): shape
        for layer, name in zip(context.parent.layers, context.parent.layer_names)
        for path, experts in find_experts(layer)
        for projection, shape in shapes_of(experts).items()
    }


def limited(table: Table, name: str, limits: Limits, whole: int) -> Table:
    """The choices of a table that the limits leave to the matrices `name`, each of `whole` bytes as it is; StageError
    where there are none."""
    if any(fnmatch(name, pattern) for pattern in limits.keep):
        kept = [Choice(DENSE, FLOAT)]
        return Table(kept, np.array([float(whole)]), np.zeros((len(table.errors), 1)))
    least = max((bits for pattern, bits in limits.min_bits.items() if fnmatch(name, pattern)), default=0)
    allowed = [i for i, choice in enumerate(table.choices) if not least or (choice.rank and choice.bits >= least)]
    if not allowed:
        raise StageError(f"limits.min_bits: {name} is to have {least} bits, which gptq.bits does not allow")
    return Table([table.choices[i] for i in allowed], table.costs[allowed], table.errors[:, allowed])


def choice_tables(context: Context, widths: list[int], ranks: bool):
    """{(path, projection): Table} and {path: weak experts}; kept in `context.memo` for the next budget."""
    key = (tuple(widths), ranks)
    if key in context.memo:
        return context.memo[key]
    work = partial(_layer_tables, context.statistics.effects(context.progress), widths, ranks)
    found = dict(context.each_layer(work, context.surveyed))
    tables = {group: table for index in sorted(found) for group, table in found[index][0].items()}
    weak = {path: experts for _, experts_of in found.values() for path, experts in experts_of.items()}
    context.memo[key] = tables, weak
    return tables, weak


def _layer_tables(effects, widths, ranks, context: Context, index: int, layer, statistics: dict):
    """The same of one layer; effects: nats per token of each group."""
    tables, weak, name = {}, {}, context.parent.layer_names[index]
    damp = context.gptq.damp if context.gptq else 0.0

    def form(bits: int, columns: int, left: bool) -> dict | None:
        return None if bits == FLOAT else quant_format(context.gptq, columns, left, bits)

    for path, experts in find_experts(layer):
        full = f"{name}.{path}"
        if isinstance(experts, FactorizedExperts):
            raise StageError(f"{full}: is compressed already; a budget needs an original model")
        if not reached(statistics, path):  # kept as it is
            continue
        grams = expert_grams(statistics, path, context.device)
        weak[full] = weak_experts(statistics, path)
        for projection, weights in split_projections(experts).items():
            profiles = [profile(weights[e], grams[projection][e], damp) for e in range(expert_count(experts))]
            shape, dtype = shapes_of(experts)[projection], context.parent.stored_dtype
            try:
                table = fit_table(profiles, shape, widths, form, dtype, ranks)
            except QuantizeError as error:
                raise StageError(f"{full}.{projection}: {error}") from error
            weight = group_weight(weights, grams[projection], effects[full, projection])
            tables[full, projection] = replace(table, errors=table.errors * weight)
    return tables, weak
