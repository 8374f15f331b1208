"""What a stage is: its options, and all that the rest of the package may ask of it.

This file and those of the stages import no torch at the top, so that a recipe is checked in milliseconds.
"""

from collections.abc import Sequence
from enum import IntEnum
from inspect import isfunction
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict, model_validator

from ..errors import did_you_mean
from .effort import Effort, judged

if TYPE_CHECKING:
    from torch import nn

    from ..planning.context import Context, Plan
    from ..quantize.codec import Codecs
    from ..quantize.registry import Storage


STEP = 8  # of ranks: a grouped product needs rows of whole 16 bytes


class Form(IntEnum):
    """What weights a checkpoint has. A stage that takes a form takes all smaller ones as well."""

    ORIGINAL = 0  # those of the original model
    FEWER = 1  # the same, of some of the experts, or averages of several
    CHANGED = 2  # others, in floating point
    SPARSE = 3  # some of them zero, and not stored
    PACKED = 4  # some of them quantized


class TrainingText(NamedTuple):
    """The text that a stage trains on."""

    dataset: str | None  # None: the calibration's own
    length: int | None  # tokens of a window; None: as long as those of calibration
    windows: int  # to train on
    validation: int  # windows held out to judge by
    self_written: bool  # whether the share of calibration that the model writes is part of it


class Stage(BaseModel):
    """A stage of a recipe. Its fields are its options; its methods are all that others know of it.

    A subclass says its `name`, what it `takes` and `leaves`, and overrides `plan`, `run_layer`, and what else it needs.
    A public method that this class does not have is refused: nobody would call it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: ClassVar[str]
    takes: ClassVar[Form]  # the latest form of checkpoint that it works on
    leaves: ClassVar[Form]  # the form of its output, unless its input's is later
    budget_option: ClassVar[str | None] = None  # the option that a budget decides where it is left open

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        known = [name for name in dir(Stage) if not name.startswith("_")]
        for name, value in vars(cls).items():
            if isfunction(value) and not name.startswith("_") and name not in known:
                hint = did_you_mean(name, known)
                raise TypeError(f"{cls.__name__}.{name}: stages have no such hook, nobody would call it{hint}")

    @model_validator(mode="after")
    def _no_unused(self):
        given: dict[str, list[str]] = {}
        for name, need in self.unused_options().items():
            if name in self.model_fields_set:
                given.setdefault(need, []).append(name)
        if given:
            raise ValueError("; ".join(f"{', '.join(sorted(given[need]))}: only with {need}" for need in given))
        return self

    def label(self) -> str:
        """The stage in the names of tables: svd40, gptq3."""
        return self.name

    def unused_options(self) -> dict[str, str]:
        """Options that have no effect beside the others, {name: what they need}."""
        return {}

    def needs_budget(self) -> bool:
        """Whether a budget has to decide `budget_option`."""
        return self.budget_option is not None and getattr(self, self.budget_option) is None

    def calibration_walks(self) -> int:
        """How many models the stage takes through the calibration text while it works on their layers: 0, 1 or 2."""
        return 0

    def effort(self, shape: tuple[int, int]) -> Effort:
        """Its work on an expert matrix (out, in), beside walks and training, for a forecast of time."""
        return judged(shape)

    def in_order(self) -> bool:
        """Whether a layer depends on the result of earlier layers. If so, an interrupted stage starts at layer 0."""
        return self.calibration_walks() > 0

    def needs_sensitivity(self) -> bool:
        """Whether `plan` asks how much the model's output changes with an error in each group of experts."""
        return False

    def training_text(self) -> TrainingText | None:
        """The text that the stage trains on; None where it does not train."""
        return None

    def codec(self) -> "Codecs":
        """How a stage that quantizes brings weights into its format."""
        raise NotImplementedError(f"{type(self).__name__}.codec")

    def storages(self) -> list["Storage"]:
        """What a budget may choose of, for a stage that quantizes."""
        raise NotImplementedError(f"{type(self).__name__}.storages")

    def plan(self, context: "Context") -> "Plan":
        """What the stage will do, decided before any weight is changed."""
        raise NotImplementedError(f"{type(self).__name__}.plan")

    def prepare(self, context: "Context", plan: "Plan", folder: Path) -> "Plan":
        """Work before the first layer, for example training, in the stage's own folder. Returns the plan to follow."""
        return plan

    def run_layer(self, context: "Context", index: int, layer: "nn.Module", statistics: dict, plan: "Plan") -> dict:
        """Changes a loaded layer as planned. Returns the errors of its matrices."""
        raise NotImplementedError(f"{type(self).__name__}.run_layer")

    def run_outer(self, context: "Context", plan: "Plan") -> dict:
        """Changes what is not in a layer, which is loaded. Returns the errors of its matrices."""
        return {}

    def changes(self, context: "Context", plan: "Plan") -> set[str]:
        """Names of the tensors outside the modules of its layout that the stage changed. All others are compared with
        the stage's input when it is done. Called after the last layer."""
        return set()

    def conclude(self, folder: Path) -> None:
        """Removes from the finished checkpoint what served the work alone."""


STAGES: dict[str, type[Stage]] = {}


def register(stage: type[Stage]) -> type[Stage]:
    """Makes a stage known to recipes by its name; may stand before a class as a decorator. ValueError where another
    stage has that name."""
    if STAGES.get(stage.name, stage) is not stage:
        raise ValueError(f"two stages are named {stage.name!r}: {STAGES[stage.name]} and {stage}")
    STAGES[stage.name] = stage
    return stage


def form_after(stages: Sequence[Stage]) -> Form:
    """The form of the checkpoint that these stages make of an original model."""
    return max((stage.leaves for stage in stages), default=Form.ORIGINAL)


def packing_stage(stages: Sequence[Stage]) -> Stage | None:
    """The stage that quantizes, where there is one."""
    return next((stage for stage in stages if stage.leaves is Form.PACKED), None)


def check_ratio(value: float, what: str = "fraction of parameters removed") -> float:
    """ValueError, saying what it is, where a share that is to go is not between 0 and 1."""
    if not 0 < value < 1:
        raise ValueError(f"{value} is not between 0 and 1 ({what})")
    return value
