"""The plan of a recipe from a model's config alone: exact bytes at true shapes, where no weight is asked for."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.accounting import account, planned_model
from ..errors import UsageError
from ..memory.limits import Memory
from ..model.experts import expert_count, find_experts, shapes_of
from ..model.folder import read_config
from ..model.opened import empty_model
from ..model.stream import StreamedModel
from ..planning.context import Context, Plan
from ..recipe.recipe import Recipe


class Shapes(StreamedModel):
    """A model on the meta device whose layers have shapes and no weights."""

    def load_layer(self, index: int) -> torch.nn.Module:
        return self.layers[index]

    def drop_layer(self, index: int) -> None:
        pass


class NotMeasured(Exception):
    """A plan asks for what no config says."""


class Known(dict):
    """What is known of a layer."""

    def __missing__(self, name: str):
        raise NotMeasured(f"it asks for {name!r} of a layer's statistics")


class AlikeStatistics:
    """What stands for statistics where there are none: every expert is used by as many tokens as any other, but for one
    more or less, so that they have an order."""

    memory = Memory()

    def __init__(self, model: StreamedModel):
        self.model, self.windows = model, torch.empty(1 << 20, device="meta")

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        raise NotMeasured(f"it asks for {name!r} of the statistics")

    def layers(self, progress=None) -> Iterator[dict[str, torch.Tensor]]:
        for layer in self.model.layers:
            found = Known()
            for path, experts in find_experts(layer):
                count, features = expert_count(experts), shapes_of(experts)["down"][0]
                found[f"{path}/tokens"] = torch.full((count,), self.windows.numel() // count) - torch.arange(count)
                found[f"{path}/gram_in"] = torch.empty(count, features, features, device="meta")
            yield found


def plan_from_config(folder: Path, recipe: Recipe) -> tuple[StreamedModel, Plan, dict]:
    """The described model, the plan of the recipe's last stage, its accounting. folder: with a config.json.

    UsageError where a stage's plan depends on weights or on what a text does: sensitivities, effects, losses.
    """
    if recipe.budget is not None:
        raise UsageError(
            f"{recipe.name}: a budget is spent by what weights and text say; give a model with its weights"
        )
    config = read_config(folder)
    dtype = config.dtype or torch.bfloat16
    meta = Shapes.described(empty_model(config, dtype), folder)
    parent, plan = meta, None
    for stage in recipe.stages:
        if plan is not None:
            parent = Shapes.described(planned_model(meta, plan.layout), folder)
        if stage.training_text():
            raise UsageError(f"{recipe.name}: stage {stage.name} trains: it is planned with its text; leave it out")
        known: Any = AlikeStatistics(parent)
        context = Context(parent, known, stage, recipe.seed, torch.device("cpu"), original=meta)
        try:
            plan = stage.plan(context)
        except (NotMeasured, NotImplementedError, RuntimeError) as error:  # the last two: tensors without values
            raise UsageError(
                f"{recipe.name}: stage {stage.name} is planned by what weights and text say ({error}); give a whole "
                "model, or, for moe_svd, the numbers of its layers"
            ) from error
    assert plan is not None
    return meta, plan, account(parent, plan.layout).to_dict()
