"""Stage `d2`: D2-MoE. The experts of a projection become one base and a low-rank delta each."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from ..recipe.effort import Effort, decomposed
from ..recipe.stage import Form, Stage, check_ratio

if TYPE_CHECKING:
    from torch import nn

    from ..planning.context import Context, Plan


class D2(Stage):
    name: ClassVar[str] = "d2"
    takes: ClassVar[Form] = Form.ORIGINAL
    leaves: ClassVar[Form] = Form.CHANGED
    budget_option: ClassVar[str | None] = "ratio"

    ratio: float | None = Field(
        None, description="fraction of parameters removed, see ratio_of, between 0 and 1; open: the budget decides"
    )
    ratio_of: Literal["experts", "model"] = Field(
        "experts", description="what ratio is a share of: routed-expert parameters, or all parameters, as papers count"
    )
    delta_ratio: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="a delta's parameters as a share of its matrix, in place of a ratio (Table 12's thresholds)"
    )
    count: Literal["stored", "used"] = Field(
        "stored",
        description="channels of the bases that the ratio counts. stored: those on disk. used: those that a token "
        "uses, as Table 12 counts; then less is removed than ratio says",
    )
    merge: Literal["fisher", "frequency", "mean", "regmean", "ties"] = Field(
        "fisher",
        description="how the base is made. fisher, frequency, mean: what weights the experts. regmean: the least "
        "squares of all experts' outputs. ties: the largest changes from the most used expert, by elected sign",
    )
    shared_v: bool = Field(False, description="one right factor for the deltas of all experts")
    static: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="share of the base's channels left out")
    dynamic: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of the base's channels that each token leaves out by its own choice; they are stored"
    )

    @field_validator("ratio")
    @classmethod
    def _ratio(cls, value):
        return None if value is None else check_ratio(value)

    def unused_options(self) -> dict[str, str]:
        unused = {} if self.dynamic else {"count": "dynamic"}
        return unused | ({"ratio_of": "a ratio"} if self.ratio is None else {})

    def needs_budget(self) -> bool:
        return self.ratio is None and self.delta_ratio is None

    @model_validator(mode="after")
    def _something_left(self):
        if self.ratio is not None and self.delta_ratio is not None:
            raise ValueError("ratio: follows from delta_ratio; remove one of them")
        if self.count == "used" and self.ratio is None:
            raise ValueError("count: only with a ratio; a delta_ratio or a budget counts nothing that is not stored")
        if self.static + self.dynamic >= 1:
            raise ValueError(f"static {self.static} and dynamic {self.dynamic}: leave nothing of the base; lower them")
        return self

    def effort(self, shape: tuple[int, int]) -> Effort:
        return decomposed(shape)

    def label(self) -> str:
        pruned = f"-p{round(self.static * 100)}+{round(self.dynamic * 100)}-" if self.static or self.dynamic else ""
        ratio = "" if self.ratio is None else f"{round(self.ratio * 100)}"
        if self.delta_ratio is not None:
            ratio = f"-delta{self.delta_ratio * 100:g}"
        of = "-of-model" if ratio and self.ratio_of == "model" else ""
        return f"d2-{self.merge}{pruned}{ratio}{of}".removesuffix("-").replace("--", "-")

    def plan(self, context: "Context") -> "Plan":
        from .d2_plan import plan

        return plan(context, self)

    def prepare(self, context: "Context", plan: "Plan", folder: Path) -> "Plan":
        from .d2_work import prepare

        return prepare(context, self, plan, folder)

    def run_layer(self, context: "Context", index: int, layer: "nn.Module", statistics: dict, plan: "Plan") -> dict:
        from .d2_work import run_layer

        return run_layer(context, self, index, layer, statistics, plan)
