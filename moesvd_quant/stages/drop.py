"""Stage `drop`: whole MoE layers give nothing: the residual stream passes them by."""

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from ..recipe.stage import Form, Stage

if TYPE_CHECKING:
    from torch import nn

    from ..planning.context import Context, Plan


class Drop(Stage):
    name: ClassVar[str] = "drop"
    takes: ClassVar[Form] = Form.ORIGINAL
    leaves: ClassVar[Form] = Form.FEWER

    layers: Annotated[int, Field(ge=1)] = Field(
        description="how many MoE layers lose all of their experts: those that change their hidden states least"
    )

    def label(self) -> str:
        return f"drop{self.layers}"

    def plan(self, context: "Context") -> "Plan":
        from .drop_work import plan

        return plan(context, self)

    def run_layer(self, context: "Context", index: int, layer: "nn.Module", statistics: dict, plan: "Plan") -> dict:
        from .drop_work import run_layer

        return run_layer(context, index, layer, plan)
