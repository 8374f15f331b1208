"""The plan of all stages of a run, before any weight is changed."""

from functools import partial

from ..checkpoint.accounting import account, planned_model
from ..checkpoint.layout import layout_of
from ..checkpoint.unused import unused_note
from ..model.stream import StreamedModel
from ..planning.context import Context, StageError
from ..recipe.budget import kv_cache_bytes, parse_budget
from ..recipe.stage import packing_stage
from ..runtime.parts import layout_from


def plan_stages(run) -> list[dict]:
    """Bytes and decisions of each stage, [{"stage", "accounting", "decisions", "notes", "layout"}], before any weight
    is changed. A stage after the first is planned on the layout of the one before.

    Under a budget in bytes the result uses at least 98 % of it and never more; StageError names the smallest possible.
    """
    if run.recipe.budget is None:
        return _plan_all(run, None, {})
    budget = parse_budget(run.recipe.budget)
    memo: dict = {}
    if budget.unit == "bpw":
        weights = account(run.meta, layout_of(run.meta)).original_expert_params
        return _plan_all(run, budget.amount * weights / 8, memo)
    limits = run.recipe.limits
    counted = "disk_bytes" if limits.of == "disk" else "resident_bytes"
    amount = budget.amount - _reserve(run)
    least = _plan_all(run, 0.0, memo)[-1]["accounting"]
    if least[counted] > amount:
        raise StageError(
            f"budget: {run.recipe.budget} cannot be met: the smallest possible is "
            f"{(least[counted] + budget.amount - amount) / 1e6:.3f} MB"
            + (f", {_reserve(run) / 1e6:.3f} of them for keys and values" if limits.kv_cache else "")
        )
    share = least["expert_bytes"] + amount - least[counted]
    for _ in range(8):  # names of tensors take bytes too: how many is known when the plan is made
        forecasts = _plan_all(run, share, memo)
        excess = forecasts[-1]["accounting"][counted] - amount
        if excess <= 0:
            return forecasts
        share -= excess
    raise StageError(f"budget: {run.recipe.budget} could not be met exactly; give a few bytes more or less")


def _reserve(run) -> int:
    """Bytes of the budget that are left to keys and values."""
    cache = run.recipe.limits.kv_cache
    if cache is None:
        return 0
    item = run.meta.stored_dtype.itemsize
    return kv_cache_bytes(run.meta.config.get_text_config(), cache.context, cache.batch, item)


def _plan_all(run, budget: float | None, memo: dict) -> list[dict]:
    forecasts: list[dict] = []
    storages: dict = {}
    packing = packing_stage(run.recipe.stages)
    for index, stage in enumerate(run.recipe.stages):
        parent = run.meta
        if forecasts:
            planned = planned_model(run.meta, layout_from(forecasts[-1]["layout"]))
            parent = StreamedModel.described(planned, run.meta.folder, run.meta.device, run.meta)
        progress = lambda done, total: run.report("reading the model", done, total)  # noqa: E731
        context = Context(
            parent,
            run.statistics,
            stage,
            run.recipe.seed,
            run.device,
            progress,
            run.meta,
            budget,
            storages,
            packing,
            memo,
            run.recipe.limits,
        )
        context.pool, context.report, context.training = run.pool, run.report, run.training(index)
        context.surveyed = partial(run.report, f"{stage.name}: planning")
        plan = stage.plan(context)
        storages = plan.storages
        forecasts.append(
            {
                "stage": stage.name,
                "accounting": account(parent, plan.layout).to_dict(),
                "decisions": plan.decisions,
                "notes": plan.notes | unused_note(run.meta),
                "layout": plan.layout.to_dict(),
            }
        )
    return forecasts
