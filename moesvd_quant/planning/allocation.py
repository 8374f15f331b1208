"""Plans by one allocation over all experts of the model: ranks that keep a share of the parameters, or rank and bits
under a byte budget."""

from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatch
from math import prod

import numpy as np

from ..checkpoint.layout import layout_of
from ..model.experts import all_shapes, find_experts
from ..model.remaining import is_gone
from ..quantize.codec import Codecs, QuantizeError
from ..recipe.recipe import Limits
from ..runtime.parts import JOINT
from .choices import Choices, choices_of
from .context import UNREACHED, Context, Plan, StageError
from .knapsack import DENSE, FLOAT, Allocation, Choice, Storage, Table, allocate, least_cost
from .parts import parts_by_choice
from .shares import kept_share
from .tables import describe


def plan_ratio(context: Context, ratio: float, of: str = "experts") -> Plan:
    """Ranks of all experts that leave out a fraction `ratio` of their parameters, or `of` the "model"'s, in floating
    point."""
    found = choices_of(context, [FLOAT], ranks=True)
    if not found.tables:
        raise StageError("no calibration token reached any expert; give other calibration text")
    left = kept_share(context.parent, ratio, of, {path for path, _ in found.tables})
    made = allocate(found.tables, left * context.parent.stored_dtype.itemsize)
    plan = _explained(plan_of(context, found, made.choices), context, found.tables, made)
    return replace(plan, storages={})  # the stage that quantizes has its own


def plan_budget(context: Context, ranks: bool) -> Plan:
    """Ranks (where `ranks`) and storages of all experts within `context.budget` bytes and `context.limits`."""
    limits = context.limits
    found = choices_of(context, allowed_storages(context), ranks)
    item, shapes = context.parent.stored_dtype.itemsize, _shapes(context)
    tables = {key: limited(table, *key, limits, prod(shapes[key]) * item) for key, table in found.tables.items()}
    ties: dict[tuple[str, str], Hashable] = {
        key: key[0] for key, table in tables.items() if limits.one_width_per_layer and len(table.choices) > 1
    }
    try:
        made = allocate(tables, context.budget or least_cost(tables), ties)
    except ValueError as error:
        raise StageError(f"budget: {error}") from error
    return _explained(plan_of(context, found, made.choices), context, tables, made)


def allowed_storages(context: Context) -> list[Storage]:
    """What the stage that quantizes (this one or one to come) and the limits leave to choose of. FLOAT alone without
    such a stage; FLOAT as well where its bits are open."""
    packing, widths = context.packing, context.limits.widths
    if packing is None:
        return [FLOAT]
    storages = in_formats(packing.storages(), context.limits)
    if not packing.needs_budget():
        return storages
    return [storage for storage in [*storages, FLOAT] if widths is None or storage.rate in widths]


OTHER_BITS = 4  # of linears outside the experts, where a budget decides about the experts


def plain_storage(packing, limits: Limits, codec: Codecs) -> Storage:
    """What the stage `packing` stores everything in that no budget decides about: as the recipe says, or OTHER_BITS or
    near it, in the format that loses least."""
    storages = in_formats(packing.storages(), limits)
    # Any size will do to compare by: as if it were pruned, it need not suit the groups.
    return min(storages, key=lambda s: (abs(s.rate - OTHER_BITS), codec.noise(codec.form(s, 1024, pruned=True))))


@contextmanager
def named(where: str) -> Iterator[None]:
    """A matrix that cannot be quantized is a StageError that names `where`."""
    try:
        yield
    except QuantizeError as error:
        raise StageError(f"{where}: {error}") from error


def in_formats(storages: list[Storage], limits: Limits) -> list[Storage]:
    """Those whose format the limits allow."""
    return [storage for storage in storages if limits.formats is None or storage.format in limits.formats]


def plan_of(context: Context, found: Choices, choices: dict[tuple[str, str], list[Choice]]) -> Plan:
    """The plan in which each expert becomes what was chosen for it, by (path, projection)."""
    layout = layout_of(context.parent)
    decisions: dict = {}
    storages: dict = {}
    for path in {path for path, _ in choices}:
        layout.experts[path] = {}
    for (path, name), chosen in choices.items():
        parts, how = parts_by_choice(chosen)
        layout.experts[path][name] = parts
        storages.setdefault(path, {})[name] = how
        decision = {"weak_experts": found.weak[path], "price": found.prices[path], "choices": {}, "forecast": {}}
        decisions.setdefault(path, decision)["choices"][name] = [describe(choice) for choice in chosen]
    return Plan(layout, decisions, storages=storages)


def _explained(plan: Plan, context: Context, tables: dict, made: Allocation) -> Plan:
    """The plan of an allocation, with its forecast and what it leaves alone."""
    for (path, name), choices in made.choices.items():
        plan.decisions[path]["forecast"][name] = forecast_error(tables[path, name], choices)
    plan.notes["allocation"] = {"forecast": made.error, "bound": made.bound, "gap": made.gap}
    if kept := {path: UNREACHED for path, _ in _shapes(context) if path not in plan.storages}:
        plan.notes["kept in 16 bit"] = kept
    return plan


def forecast_error(table: Table, choices: list[Choice]) -> float:
    """What the choices of the experts of a group are forecast to cost together."""
    return float(sum(table.errors[expert, table.choices.index(choice)] for expert, choice in enumerate(choices)))


def _shapes(context: Context) -> dict[tuple[str, str], tuple[int, int]]:
    """(out, in) of the matrices of each projection of each experts module that has any, of gate and up together too."""
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for layer, name in zip(context.parent.layers, context.parent.layer_names):
        for path, experts in find_experts(layer):
            shapes = {} if is_gone(experts) else all_shapes(experts)
            found |= {(f"{name}.{path}", projection): shape for projection, shape in shapes.items()}
    return found


def limited(table: Table, path: str, projection: str, limits: Limits, whole: int) -> Table:
    """The choices of a table that the limits leave to the matrices of a projection, each of `whole` bytes as it is;
    what is said of gate or of up holds for both where they are one. StageError where there are none."""
    names = [f"{path}.{name}" for name in ((JOINT, "gate", "up") if projection == JOINT else (projection,))]
    if any(_named(names, pattern) for pattern in limits.keep):
        kept = [Choice(DENSE, FLOAT)]
        return Table(kept, np.array([float(whole)]), np.zeros((len(table.errors), 1)))
    least = max((bits for pattern, bits in limits.min_bits.items() if _named(names, pattern)), default=0)
    allowed = [
        i for i, choice in enumerate(table.choices) if not least or (choice.rank and choice.storage.rate >= least)
    ]
    if not allowed:
        raise StageError(f"limits.min_bits: {names[0]} is to have {least} bits, which gptq.bits does not allow")
    return Table([table.choices[i] for i in allowed], table.costs[allowed], table.errors[:, allowed])


def _named(names: Iterable[str], pattern: str) -> bool:
    return any(fnmatch(name, pattern) for name in names)
