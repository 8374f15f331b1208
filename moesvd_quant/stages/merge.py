"""Stage `merge`: experts that are alike become one."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from ..recipe.stage import Form, Stage, check_ratio

if TYPE_CHECKING:
    from torch import nn

    from ..planning.context import Context, Plan

MERGING = "merging"  # folder in the stage's own while it works
MERGES = f"{MERGING}/experts.safetensors"
GROUP_SIZE = 16  # of the paper


class Merge(Stage):
    name: ClassVar[str] = "merge"
    takes: ClassVar[Form] = Form.ORIGINAL
    leaves: ClassVar[Form] = Form.FEWER

    ratio: float = Field(description="share of the experts' matrices that go, between 0 and 1")
    method: Literal["ream", "mc_smoe"] = Field(
        "ream",
        description="ream: the least salient experts are merged into those that matter most, and their rows of the "
        "router go. mc_smoe: experts are merged by frequency and stay in the router, on shared matrices",
    )
    group_size: Annotated[int, Field(ge=2)] = Field(
        GROUP_SIZE, description="ream: experts that are merged into one at most (C of the paper)"
    )

    @field_validator("ratio")
    @classmethod
    def _ratio(cls, value):
        return check_ratio(value, "share of the experts' matrices that go")

    def unused_options(self) -> dict[str, str]:
        return {} if self.method == "ream" else {"group_size": "method: ream"}

    def label(self) -> str:
        size = "" if self.group_size == GROUP_SIZE else f"-c{self.group_size}"
        return f"{self.method.replace('_', '-')}{size}-{round(self.ratio * 100)}"

    def plan(self, context: "Context") -> "Plan":
        from .merge_work import plan

        return plan(context, self)

    def prepare(self, context: "Context", plan: "Plan", folder: Path) -> "Plan":
        from .merge_work import prepare

        return prepare(context, self, plan, folder)

    def run_layer(self, context: "Context", index: int, layer: "nn.Module", statistics: dict, plan: "Plan") -> dict:
        from .merge_work import run_layer

        return run_layer(context, index, layer, plan)

    def conclude(self, folder: Path) -> None:
        """The order of channels stays out of the checkpoint."""
        shutil.rmtree(folder / MERGING, ignore_errors=True)
