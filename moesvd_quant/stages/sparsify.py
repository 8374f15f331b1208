"""Stage `sparsify`: the weights that matter least become zero, and are not stored."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from ..recipe.effort import Effort, judged
from ..recipe.stage import Form, Stage, check_ratio

if TYPE_CHECKING:
    from torch import nn

    from ..planning.context import Context, Plan


class Sparsify(Stage):
    name: ClassVar[str] = "sparsify"
    takes: ClassVar[Form] = Form.FEWER
    leaves: ClassVar[Form] = Form.SPARSE

    method: Literal["wanda", "sparsegpt"] = Field(
        "wanda",
        description="wanda: weights of the least |weight| times norm of their input go. sparsegpt: those whose loss "
        "others can make up for best, and these do",
    )
    pattern: Literal["2:4", "unstructured"] = Field(
        "2:4", description="2:4: two of every four neighbouring inputs go; unstructured: any"
    )
    ratio: float | None = Field(None, description="unstructured: share of the weights that go, between 0 and 1")
    layers: Literal["uniform", "owl"] = Field(
        "uniform", description="unstructured: the same ratio in each layer, or OWL's: less where outliers are many"
    )
    attention: bool = Field(True, description="attention, shared-expert and dense-layer linears as well")
    damp: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.01, description="sparsegpt: share of the mean added to the Hessian"
    )

    @field_validator("ratio")
    @classmethod
    def _ratio(cls, value):
        return None if value is None else check_ratio(value, "share of the weights that go")

    @model_validator(mode="after")
    def _has_ratio(self):
        if self.pattern == "unstructured" and self.ratio is None:
            raise ValueError("ratio: is required with pattern: unstructured (share of the weights that go)")
        return self

    def unused_options(self) -> dict[str, str]:
        unused = {} if self.pattern == "unstructured" else dict.fromkeys(("ratio", "layers"), "pattern: unstructured")
        return unused if self.method == "sparsegpt" else unused | {"damp": "method: sparsegpt"}

    def calibration_walks(self) -> int:
        return 1

    def effort(self, shape: tuple[int, int]) -> Effort:
        """An inverse of the Gram matrix, and its Cholesky factor."""
        return judged(shape, 2)._replace(factors=shape[1] ** 3)

    def label(self) -> str:
        much = self.pattern if self.ratio is None else str(round(self.ratio * 100))
        return "-".join([self.method, *(["owl"] if self.layers == "owl" else []), much])

    def plan(self, context: "Context") -> "Plan":
        from .sparsify_work import plan

        return plan(context, self)

    def run_layer(self, context: "Context", index: int, layer: "nn.Module", statistics: dict, plan: "Plan") -> dict:
        from .sparsify_work import run_layer

        return run_layer(context, self, index, layer, plan)
