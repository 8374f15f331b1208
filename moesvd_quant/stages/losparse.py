"""Stage `losparse`: expert matrices become low-rank factors and a rest whose rows are pruned while both are trained."""

import shutil
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from ..recipe.stage import Form, Stage, TrainingText, check_ratio
from .lora import TRAINING, Lora

if TYPE_CHECKING:
    from torch import nn

    from ..planning.context import Context, Plan


class LoSparse(Stage):
    name: ClassVar[str] = "losparse"
    takes: ClassVar[Form] = Form.FEWER
    leaves: ClassVar[Form] = Form.SPARSE

    low_rank: float = Field(0.05, description="parameters of the factors, as a share of their matrix")
    rest: float = Field(0.15, description="share of the weights of all rests together that stays, in whole rows")
    untouched: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.055, description="share of the steps before rows are pruned"
    )
    settled: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.275, description="share of the steps after no more are pruned; one of these is taken over"
    )
    objective: Literal["lm", "distill"] = Field(
        "lm", description="lm: next token; distill: the original's predictions (KL divergence)"
    )
    dataset: str = Field("calibration", description="text or instruction data; calibration: the recipe's own")
    length: Literal["auto"] | Annotated[int, Field(ge=16)] = Field("auto", description="tokens per window")
    steps: Annotated[int, Field(ge=2)] = Field(500, description="optimizer steps")
    batch: Annotated[int, Field(gt=0)] = Field(16, description="windows per step")
    microbatch: Annotated[int, Field(gt=0)] = Field(4, description="windows at once; the rest is accumulated")
    lr: Annotated[float, Field(gt=0)] = Field(9e-5, description="peak of the cosine schedule")
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(0.05, description="share of the steps with a rising rate")
    validation: Annotated[int, Field(gt=0)] = Field(64, description="windows held out to judge by")
    validate_every: Annotated[int, Field(gt=0)] = Field(50, description="steps between validations, and saves")
    checkpointing: bool = Field(True, description="recompute activations: less memory, a third more time")

    @field_validator("low_rank", "rest")
    @classmethod
    def _share(cls, value):
        return check_ratio(value, "share that stays")

    @model_validator(mode="after")
    def _fits(self):
        if self.low_rank + self.rest >= 1:
            raise ValueError(f"low_rank {self.low_rank} and rest {self.rest}: as large as the matrices; lower them")
        if self.untouched + self.settled >= 1:
            raise ValueError(
                f"untouched {self.untouched} and settled {self.settled}: leave no step to prune; lower them"
            )
        training_of(self)
        return self

    def label(self) -> str:
        kept = round((self.low_rank + self.rest) * 100)
        return f"losparse{100 - kept}" + ("-distilled" if self.objective == "distill" else "")

    def training_text(self) -> TrainingText:
        return training_of(self).training_text()

    def plan(self, context: "Context") -> "Plan":
        from .losparse_work import plan

        return plan(context, self)

    def prepare(self, context: "Context", plan: "Plan", folder: Path) -> "Plan":
        from .losparse_work import prepare

        return prepare(context, self, folder)

    def run_layer(self, context: "Context", index: int, layer: "nn.Module", statistics: dict, plan: "Plan") -> dict:
        from .losparse_work import run_layer

        return run_layer(context, index, layer, statistics, plan)

    def conclude(self, folder: Path) -> None:
        """Optimizer states and all else that served training stay out of the checkpoint."""
        shutil.rmtree(folder / TRAINING, ignore_errors=True)


def training_of(options: LoSparse) -> Lora:
    """The same as options of stage `lora`, which trains. ValueError where they do not fit together."""
    same = ("objective", "dataset", "length", "steps", "batch", "microbatch", "lr", "warmup", "validation")
    given = {name: getattr(options, name) for name in (*same, "validate_every", "checkpointing")}
    return Lora(train="factors", attention=False, patience=options.steps, **given)


def moments_of(options: LoSparse) -> tuple[int, int]:
    """The steps up to which nothing is pruned, and after which no more is."""
    done = options.steps - ceil(options.settled * options.steps)
    return min(round(options.untouched * options.steps), done - 1), done
