"""Stage `lora`: what compression lost is trained back, and merged; beside packed weights it stays a low-rank term, or
moves their scales."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from ..recipe.stage import Form, Stage, TrainingText

if TYPE_CHECKING:
    from torch import nn

    from ..planning.context import Context, Plan

TRAINING = "training"  # folder of optimizer states, gone from the finished checkpoint


class Lora(Stage):
    name: ClassVar[str] = "lora"
    takes: ClassVar[Form] = Form.PACKED
    leaves: ClassVar[Form] = Form.CHANGED

    train: Literal["adapters", "factors", "router", "scales"] = Field(
        "adapters",
        description="adapters: LoRA, merged afterwards, or kept as a low-rank term where weights are packed; factors: "
        "the 16-bit factors themselves; router: the routers alone; scales: after gptq, the scales of what is packed, "
        "after sparsify, the values that are left; norms, and routers, in the bytes they have",
    )
    objective: Literal["lm", "distill", "layerwise"] = Field(
        "lm",
        description="lm: next token; distill: the original's predictions (KL divergence); layerwise: each layer's "
        "output in the original, one layer of each model in memory",
    )
    rank: Annotated[int, Field(ge=8, multiple_of=8)] = Field(16, description="rank of the adapters, a multiple of 8")
    attention: bool = Field(True, description="attention, shared-expert and dense-layer linears as well")
    in_turn: bool = Field(False, description="left factors in the first half of the steps, right ones in the second")
    frozen: Literal["stored", "nf4"] = Field("stored", description="what is not trained meanwhile: as stored, or NF4")
    dataset: str = Field(
        "calibration",
        description="text or instruction data; calibration: the recipe's own, with what the model wrote of it unless "
        "objective is lm",
    )
    length: Literal["auto"] | Annotated[int, Field(ge=16)] = Field("auto", description="tokens per window")
    steps: Annotated[int, Field(gt=0)] = Field(500, description="optimizer steps; layerwise: of each layer")
    batch: Annotated[int, Field(gt=0)] = Field(16, description="windows per step")
    microbatch: Annotated[int, Field(gt=0)] = Field(4, description="windows at once; the rest is accumulated")
    lr: Annotated[float, Field(gt=0)] = Field(
        5e-4, description="peak of the cosine schedule; 5e-3 is a good value where scales are trained"
    )
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(0.05, description="share of the steps with a rising rate")
    validation: Annotated[int, Field(gt=0)] = Field(64, description="windows held out to judge by")
    validate_every: Annotated[int, Field(gt=0)] = Field(50, description="steps between validations, and saves")
    patience: Annotated[int, Field(gt=0)] = Field(5, description="validations without gain before training stops")
    checkpointing: bool = Field(True, description="recompute activations: less memory, a third more time")

    @model_validator(mode="after")
    def _fits(self):
        if self.batch % self.microbatch:
            raise ValueError(f"batch: {self.batch} is not a multiple of microbatch {self.microbatch}")
        if self.in_turn and self.train in ("router", "scales"):
            what = "a router has" if self.train == "router" else "scales have"
            raise ValueError(f"in_turn: {what} no left and right factor; use train: adapters or factors")
        if self.frozen == "nf4" and self.train != "adapters":
            raise ValueError("frozen: nf4 needs train: adapters; what is quantized cannot be trained itself")
        return self

    def label(self) -> str:
        what = {"adapters": f"lora{self.rank}", "factors": "tuned"}.get(self.train, self.train)
        return what + {"lm": "", "distill": "-distilled", "layerwise": "-layerwise"}[self.objective]

    def training_text(self) -> TrainingText:
        own = self.dataset == "calibration"
        return TrainingText(
            dataset=None if own else self.dataset,
            length=None if self.length == "auto" else self.length,
            windows=self.steps * self.batch,
            validation=self.validation,
            self_written=own and self.objective != "lm",
        )

    def plan(self, context: "Context") -> "Plan":
        from .lora_work import plan

        return plan(context, self)

    def prepare(self, context: "Context", plan: "Plan", folder: Path) -> "Plan":
        from .lora_work import prepare

        return prepare(context, self, plan, folder)

    def run_layer(self, context: "Context", index: int, layer: "nn.Module", statistics: dict, plan: "Plan") -> dict:
        from .lora_work import run_layer

        return run_layer(context, self, index, layer, statistics, plan)

    def changes(self, context, plan):
        from .lora_work import changes

        return changes(context, plan)

    def conclude(self, folder: Path) -> None:
        """Optimizer states and all else that served training stay out of the checkpoint."""
        shutil.rmtree(folder / TRAINING, ignore_errors=True)
