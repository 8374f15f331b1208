"""All that is wrong with the content of a recipe, a line each."""

from typing import Any

from pydantic import ValidationError

from ..errors import did_you_mean
from .budget import parse_budget
from .places import Places
from .recipe import Limits, Recipe, RecipeError
from .stage import STAGES, Stage, form_after, packing_stage


def checked_recipe(name: str, content: dict, places: Places) -> Recipe:
    """The recipe of a file's content; RecipeError with all that is wrong, each with where it stands."""
    problems: list[str] = []
    stages = _stages(content, places, problems)
    body = {k: v for k, v in content.items() if k != "stages"}
    recipe = _validate(Recipe, body | {"name": name, "stages": stages}, (), places, problems)
    problems += _budget_problems(content, stages, places)
    if recipe is not None and recipe.limits != Limits():
        problems += [f"{places.of(('limits',))}: {problem}" for problem in _limit_problems(recipe)]
    if problems:
        raise RecipeError("\n".join(problems))
    return recipe


def _budget_problems(content: dict, stages: tuple[Stage, ...], places: Places) -> list[str]:
    """A budget that nothing is left to decide for, or something to decide and no budget."""
    open_stages = [(i, s) for i, s in enumerate(stages) if s.needs_budget()]
    if content.get("budget") is None:
        return [
            f"{places.of(('stages', i, s.name))}: stages[{i}].{s.name}.{s.budget_option}: is required, "
            "or give a budget (20GB, 1.5bpw)"
            for i, s in open_stages
        ]
    if stages and not open_stages:
        given = [f"{s.name}.{s.budget_option}" for s in stages if s.budget_option]
        remedy = f"{' and '.join(given)} is already set; remove it" if given else "add a stage that has a budget"
        return [f"{places.of(('budget',))}: budget: {remedy} to let the budget decide"]
    return []


def _stages(content: dict, places: Places, problems: list[str]) -> tuple[Stage, ...]:
    entries = content.get("stages")
    if not isinstance(entries, list) or not entries:
        problems.append(f"{places.of(('stages',))}: stages: give at least one of {', '.join(STAGES)}")
        return ()
    stages: list[Stage] = []
    for index, entry in enumerate(entries):
        at: tuple = ("stages", index)
        name: Any = entry
        given: dict = {}
        if isinstance(entry, dict):
            if len(entry) != 1:
                problems.append(f"{places.of(at)}: stages[{index}]: one stage per item, found {sorted(entry)}")
                continue
            name, given = next(iter(entry.items()))
        if name not in STAGES:
            hint = did_you_mean(str(name), STAGES)
            problems.append(
                f"{places.of((*at, name))}: stages[{index}]: unknown stage {name!r}{hint} (valid: {', '.join(STAGES)})"
            )
            continue
        kind = STAGES[name]
        if form_after(stages) > kind.takes:
            before = ", ".join(s.name for s in stages if s.leaves > kind.takes)
            problems.append(f"{places.of((*at, name))}: stages[{index}].{name}: cannot come after {before}")
        stage = _validate(kind, given or {}, (*at, name), places, problems)
        if stage is not None:
            stages.append(stage)
    return tuple(stages)


def _validate(kind, value, at: tuple, places: Places, problems: list[str]):
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        for item in error.errors():
            problems.append(_say(kind, item, at, places))
        return None


def _say(kind, item, at, places) -> str:
    inner = [p for p in item["loc"] if not str(p).startswith(("literal[", "constrained-", "list[", "dict["))]
    path = (*at, *[p for p in inner if p not in ("int", "str", "function-after")])
    key = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")
    if item["type"] == "extra_forbidden":
        owner = kind
        for part in inner[:-1]:
            owner = owner.model_fields[part].annotation
        valid = sorted(set(owner.model_fields) - {"name"})
        return f"{places.of(path)}: {key}: unknown key{did_you_mean(str(inner[-1]), valid)} (valid: {', '.join(valid)})"
    if item["type"] == "missing":
        return f"{places.of(path)}: {key}: is required ({kind.model_fields[inner[-1]].description})"
    message = item["msg"].removeprefix("Value error, ")
    got = "" if item["type"] == "value_error" else f", got {item['input']!r}"
    return f"{places.of(path, message)}: {key or 'recipe'}: {message}{got}"


def _limit_problems(recipe: Recipe) -> list[str]:
    """What limits ask for that there is nothing to apply to."""
    if recipe.budget is None:
        return ["limits: only with a budget (20GB, 1.5bpw)"]
    limits, problems = recipe.limits, []
    if parse_budget(recipe.budget).unit == "bpw" and (limits.of != "disk" or limits.kv_cache):
        problems.append("limits.of, limits.kv_cache: only with a budget in bytes, not in bits per weight")
    packing = packing_stage(recipe.stages)
    storages = packing.storages() if packing is not None else []
    rates, formats = [*(storage.rate for storage in storages), 16], [storage.format for storage in storages]
    for name, given, known in (("widths", limits.widths, rates), ("formats", limits.formats, formats)):
        if given is not None and (not given or set(given) - set(known)):
            problems.append(f"limits.{name}: give some of {', '.join(map(str, dict.fromkeys(known)))}")
    if limits.widths is not None:
        problems += [
            f"limits.min_bits.{pattern}: {bits} is more than any of limits.widths {limits.widths}"
            for pattern, bits in limits.min_bits.items()
            if bits > max(limits.widths)
        ]
        if packing is not None and not packing.needs_budget():
            key = f"{packing.name}.{packing.budget_option}"
            problems.append(f"limits.widths: {key} is given; remove it, or remove the widths")
    return problems
