"""All that the output of a stage depends on; equal keys mean equal files."""

import hashlib
import json
from importlib.metadata import version

from .. import __version__
from ..recipe.recipe import Recipe


def versions() -> dict[str, str]:
    names = ("torch", "transformers", "gptqmodel", "peft", "bitsandbytes", "safetensors")
    return {"moesvd_quant": __version__} | {name: version(name) for name in names}


def stage_key(recipe: Recipe, upto: int, model: str, statistics: str, trained: list[str]) -> dict:
    """Of the stage with index `upto`. model: digest of its files; statistics: their key; trained: digests of the texts
    that it and the stages before it train on."""
    stages = [{s.name: s.model_dump()} for s in recipe.stages]
    # Under a budget the first stage is planned for what the later ones do.
    budget = {"amount": recipe.budget, "stages": stages, "limits": recipe.limits.model_dump()}
    return {
        "model": model,
        "statistics": statistics,
        "stages": stages[: upto + 1],
        "seed": recipe.seed,
        "budget": None if recipe.budget is None else budget,
        "versions": versions(),
        "unused_tensors": recipe.unused_tensors,
    } | ({"training": trained} if trained else {})


def short_digest(key: dict) -> str:
    """Twelve hexadecimal digits that tell keys apart."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
