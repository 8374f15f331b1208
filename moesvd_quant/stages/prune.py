"""Stage `prune`: experts that matter least are left out, with their rows of the router."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from ..recipe.stage import Form, Stage, check_ratio

if TYPE_CHECKING:
    from torch import nn

    from ..planning.context import Context, Plan

Place = Annotated[str, Field(pattern=r"^\d+\.\d+$")]


class Prune(Stage):
    name: ClassVar[str] = "prune"
    takes: ClassVar[Form] = Form.ORIGINAL
    leaves: ClassVar[Form] = Form.FEWER

    ratio: float = Field(description="share of the experts left out, between 0 and 1; layers keep whole experts")
    by: Literal["reap", "frequency", "weight", "norm", "reconstruction"] = Field(
        "reap",
        description="what an expert is worth. reap: mean over its tokens of router weight times norm of its output. "
        "frequency: tokens. weight: sum of router weights. norm: sum of output norms. reconstruction: the best subset "
        "of each layer by what its output loses (NAEE)",
    )
    scope: Literal["layer", "model"] = Field(
        "layer", description="layer: the same number in each layer. model: the least of all, as a share of their layer"
    )
    protect: list[Place] = Field([], description="experts that stay whatever they are worth: layer.expert, from 0")

    @field_validator("ratio")
    @classmethod
    def _ratio(cls, value):
        return check_ratio(value, "share of the experts left out")

    def unused_options(self) -> dict[str, str]:
        return {"scope": "by other than reconstruction"} if self.by == "reconstruction" else {}

    def label(self) -> str:
        if self.by == "reconstruction":
            return f"naee-{round(self.ratio * 100)}"
        model = "-model" if self.scope == "model" else ""
        return f"{'reap' if self.by == 'reap' else f'prune-{self.by}'}{model}-{round(self.ratio * 100)}"

    def plan(self, context: "Context") -> "Plan":
        from .prune_work import plan

        return plan(context, self)

    def run_layer(self, context: "Context", index: int, layer: "nn.Module", statistics: dict, plan: "Plan") -> dict:
        from .prune_work import run_layer

        return run_layer(context, index, layer, plan)
