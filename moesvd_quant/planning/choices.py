"""What may become of every expert matrix, at which bytes, and what it is forecast to lose."""

from collections import ChainMap
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

from ..calibration.metric import METRIC
from ..model.experts import dense_weight, find_experts, shapes_of, split_projections
from ..model.remaining import is_gone, is_whole, shared_rows, sources_of
from ..quantize.codec import Bank, QuantizeError
from ..quantize.noise import NOISE
from ..runtime.factorized_experts import FactorizedExperts
from ..runtime.formats import FLOAT as FLOAT_FORMAT
from ..runtime.formats import Format
from ..runtime.parts import JOINT, joined
from ..runtime.routers import Sources
from . import tables as fitting
from .context import Context, StageError, expert_grams, reached, weak_experts
from .knapsack import FLOAT, Storage, Table
from .tables import Profile, error_price, fit_table, profile

LEAST_PRICE = 1e-30  # of experts that no error of theirs could be seen of


class Choices(NamedTuple):
    """What may become of the experts of a model: {(path, projection): Table}, {path: weak experts}, and {path:
    {projection: price}}, what a unit of error energy costs there (`fitting.error_price`)."""

    tables: dict[tuple[str, str], Table]
    weak: dict[str, dict]
    prices: dict[str, dict[str, float]]


def choices_of(context: Context, storages: list[Storage], ranks: bool) -> Choices:
    """Choices of all layers; kept in `context.memo` for the next budget. Where there are ranks to choose, gate and up
    are one projection: on one right factor they lose less for the same bytes (docs/results/sharing.md)."""
    key = (tuple(storages), ranks)
    if key not in context.memo:
        sources = _require_whole(context)
        effects = context.statistics.effects(partial(context.report, "effects of errors on the output"))
        work = partial(_layer_choices, effects, storages, ranks, sources)
        reading = replace(context, parent=context.original or context.parent)
        found = dict(reading.each_layer(work, context.surveyed))
        layers = [found[index] for index in sorted(found)]
        context.memo[key] = Choices(*(dict(ChainMap(*reversed(part))) for part in zip(*layers)))
    return context.memo[key]


def _require_whole(context: Context) -> dict[str, Sources]:
    """Before any walk: StageError for experts that are compressed already. From which of the original's experts those
    of each module come: of none, where its layer was dropped."""
    sources = {}
    for layer, name in zip(context.parent.layers, context.parent.layer_names):
        for path, experts in find_experts(layer):
            if isinstance(experts, FactorizedExperts) and not is_whole(experts):
                raise StageError(
                    f"{name}.{path}: {_what(experts)} already; ranks and widths are chosen of an original model"
                )
            sources[f"{name}.{path}"] = [] if is_gone(experts) else sources_of(experts)
    return sources


def _what(experts: FactorizedExperts) -> str:
    """What was done to experts that are not whole."""
    if any(part.rank for parts in experts.layout.values() for part in parts):
        return "is factorized"
    return "is merged on shared matrices" if any(len(rows) > 1 for rows in shared_rows(experts)) else "is compressed"


def _layer_choices(
    effects, storages, ranks, sources: dict[str, Sources], context: Context, index: int, layer, statistics: dict
) -> Choices:
    """Choices of the experts of one layer of the original; effects: nats per token of each group; sources: which of
    them there are."""
    made, name = Choices({}, {}, {}), context.parent.layer_names[index]
    damp = context.packing.damp if context.packing else 0.0

    codec = context.packing.codec() if context.packing else None

    def form(storage: Storage, columns: int, bank: Bank) -> Format:
        return FLOAT_FORMAT if storage == FLOAT or codec is None else codec.form(storage, columns, bank)

    def noise(form: Format) -> float:
        return 0.0 if codec is None or not form.packed else codec.noise(form)

    for path, experts in find_experts(layer):
        full = f"{name}.{path}"
        if not sources[full] or not reached(statistics, path):  # kept as it is
            continue
        made.weak[full] = weak_experts(statistics, path, sources[full])
        shapes = joined(shapes_of(experts)) if ranks else shapes_of(experts)
        make = partial(_profiles, context, experts, sources[full], statistics, path, full, effects, damp, list(shapes))
        depends = {"metric": METRIC, "noise": NOISE, "damp": damp, "joint": ranks, "least": LEAST_PRICE}
        depends |= fitting.settings() | {"effects": context.statistics.effect_settings()}
        depends["sources"] = sources[full]
        kept = context.statistics.kept(f"profiles-{full}", make, **depends)
        made.prices[full] = {key.removesuffix("/price"): float(kept[key]) for key in kept if key.endswith("/price")}
        for projection, shape in shapes.items():
            values = (kept[f"{projection}/{key}"] for key in ("spectrum", "dense", "factors"))
            profiles = [Profile(spectrum, float(dense), factors) for spectrum, dense, factors in zip(*values)]
            try:
                table = fit_table(profiles, shape, storages, form, noise, context.parent.stored_dtype, ranks)
            except QuantizeError as error:
                raise StageError(f"{full}.{projection}: {error}") from error
            made.tables[full, projection] = table
    return made


def _profiles(
    context, experts, sources: Sources, statistics, path, full, effects, damp, names: list[str]
) -> dict[str, torch.Tensor]:
    """{projection/price: (), and of those in `names` projection/spectrum (E, k), /dense (E,), /factors (E, k)}."""
    grams = expert_grams(statistics, path, context.device, sources=sources)
    kept = [first for first, *_ in sources]
    weights = {name: weight[kept] for name, weight in split_projections(experts).items()}
    prices = {name: error_price(weights[name], grams[name], effects[full, name]) for name in weights}
    found = {f"{name}/price": torch.tensor(price, dtype=torch.float64) for name, price in prices.items()}
    for name in names:
        scale = row_scale(prices, name, shapes_of(experts)).to(context.device)
        scaled = (dense_weight(experts, name, e, torch.float32) * scale for e in kept)
        made = [profile(weight, gram, damp) for weight, gram in zip(scaled, grams[name])]
        found[f"{name}/spectrum"] = torch.stack([one.spectrum for one in made])
        found[f"{name}/dense"] = torch.tensor([one.dense for one in made], dtype=torch.float64)
        found[f"{name}/factors"] = torch.stack([one.factors for one in made])
    return found


def row_scale(prices: dict[str, float], name: str, shapes: dict[str, tuple[int, int]]) -> torch.Tensor:
    """Root of the price of each row of a projection, (out, 1) float32; `gate_up` has the rows of both."""
    names = ("gate", "up") if name == JOINT else (name,)
    parts = [torch.full((shapes[n][0], 1), max(prices[n], LEAST_PRICE) ** 0.5) for n in names]
    return torch.cat(parts)
