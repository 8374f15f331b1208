"""Stage `slim`: experts lose the intermediate channels that the others make up for best."""

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, field_validator

from ..recipe.stage import Form, Stage, check_ratio

if TYPE_CHECKING:
    from torch import nn

    from ..planning.context import Context, Plan


class Slim(Stage):
    name: ClassVar[str] = "slim"
    takes: ClassVar[Form] = Form.FEWER
    leaves: ClassVar[Form] = Form.CHANGED

    ratio: float = Field(description="share of each expert's intermediate channels that go, between 0 and 1")
    damp: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.01, description="share of the mean added to the Gram matrix that down is refitted by"
    )

    @field_validator("ratio")
    @classmethod
    def _ratio(cls, value):
        return check_ratio(value, "share of the channels that go")

    def label(self) -> str:
        return f"slim{round(self.ratio * 100)}"

    def plan(self, context: "Context") -> "Plan":
        from .slim_work import plan

        return plan(context, self)

    def run_layer(self, context: "Context", index: int, layer: "nn.Module", statistics: dict, plan: "Plan") -> dict:
        from .slim_work import run_layer

        return run_layer(context, self, index, layer, statistics, plan)
