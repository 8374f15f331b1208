"""What a recipe says: its keys, their types, defaults and descriptions."""

from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationInfo, field_validator

from ..errors import MoesvdError
from .budget import parse_budget
from .stage import Stage
from .tasks import Tasks, data_folder, require_allowed, require_files, require_known
from .texts import named_texts


class RecipeError(MoesvdError, ValueError):
    """Everything that is wrong with a recipe: a line each, `file:line: key: what, and what to do`."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Calibration(_Part):
    dataset: str = Field("mixture", description="a known name, local files or folders, joined by commas")
    samples: Annotated[int, Field(gt=0)] = Field(256, description="windows of text")
    length: Literal["auto"] | Annotated[int, Field(ge=16)] = Field("auto", description="tokens per window")
    self_written: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="share of the windows that the model writes itself"
    )


class Evaluate(_Part):
    perplexity: list[str] | dict[str, str] = Field(
        default_factory=list, description="texts: known names, or name: source"
    )
    length: Literal["auto"] | Annotated[int, Field(ge=16)] = Field("auto", description="tokens per window")
    tasks: str | list[str] = Field(
        default_factory=list, description="tasks of lm-eval, by its names; zero-shot: the paper's seven"
    )
    task_data: str | None = Field(
        None, validate_default=True, description="folder of local task files; else lm-eval loads from the hub"
    )
    limit: Annotated[int, Field(gt=0)] | None = Field(None, description="only so many documents of each task")
    run_code: bool = Field(
        False, validate_default=True, description="run programs that the model writes, where a task (humaneval) does"
    )

    def wanted_tasks(self) -> Tasks:
        names = tuple([self.tasks] if isinstance(self.tasks, str) else self.tasks)
        return Tasks(names, self.task_data, self.limit, self.run_code)

    def texts(self) -> dict[str, str]:
        """{name: source}; a list names known texts or files."""
        named = self.perplexity
        return dict(named) if isinstance(named, dict) else named_texts(named)

    @field_validator("perplexity")
    @classmethod
    def _distinct(cls, value):
        if isinstance(value, list):
            named_texts(value)
        return value

    @field_validator("tasks")
    @classmethod
    def _known(cls, value):
        require_known([value] if isinstance(value, str) else value)
        return value

    @field_validator("task_data", "limit", "run_code")
    @classmethod
    def _of_tasks(cls, value, info: ValidationInfo):
        if "tasks" not in info.data:  # which is wrong, and said
            return value
        tasks = info.data["tasks"]
        if value and not tasks:
            raise ValueError("only with tasks")
        if info.field_name == "run_code":
            require_allowed([tasks] if isinstance(tasks, str) else tasks, value)
        if info.field_name == "task_data":
            try:
                require_files([tasks] if isinstance(tasks, str) else tasks, data_folder(value))
            except FileNotFoundError as error:
                raise ValueError(str(error)) from error
        return value


class KvCache(_Part):
    context: Annotated[int, Field(gt=0)] = Field(description="tokens of a sequence")
    batch: Annotated[int, Field(gt=0)] = Field(1, description="sequences at a time")


class Limits(_Part):
    """What a budget counts, and what its allocation must respect. Patterns match `model.layers.3.mlp.experts.down`."""

    of: Literal["disk", "resident"] = Field("disk", description="a budget in bytes: of all files, or when loaded")
    kv_cache: KvCache | None = Field(None, description="bytes of the budget that are left to keys and values")
    widths: list[float] | None = Field(None, description="the only widths there are kernels for; 16: not quantized")
    formats: list[str] | None = Field(None, description="the only formats there are kernels for, of those of `gptq`")
    one_width_per_layer: bool = Field(False, description="all experts of a layer in one width, as kernels want it")
    keep: list[str] = Field(default_factory=list, description="patterns of matrices that stay as they are")
    min_bits: dict[str, Annotated[float, Field(ge=1, le=16)]] = Field(
        default_factory=dict, description="pattern: fewest bits of the matrices it matches"
    )


class Recipe(_Part):
    """A validated recipe; see `load_recipe`."""

    name: str = Field(description="of its file")
    model: str | None = Field(None, description="folder, hub name or `reference`; --model goes before it")
    seed: int = Field(0, description="chooses windows of text; all else is deterministic")
    calibration: Calibration = Field(Calibration(), description="text whose statistics steer the compression")
    experts: Literal["routed", "all"] = Field(
        "routed", description="what is compressed as experts; all: shared experts as well, which every token passes"
    )
    balance: bool = Field(
        False,
        description="channels between up and down that are large in one and small in the other are made alike first, "
        "by powers of two: nothing that the model computes changes",
    )
    unused_tensors: Literal["keep", "leave_out"] = Field(
        "keep",
        description="tensors that transformers does not use, such as layers for multi-token prediction",
    )
    stages: tuple[SerializeAsAny[Stage], ...] = Field(description="what is done, in this order")
    evaluate: Evaluate = Field(Evaluate(), description="what is measured of the original and of every checkpoint")
    keep: Literal["all", "last"] = Field("all", description="the checkpoints of all stages, or of the last one alone")
    budget: str | None = Field(
        None, description="bytes (20GB) or bits per expert weight (1.5bpw); decides what stages leave open"
    )
    limits: Limits = Field(Limits(), description="what a budget counts, and what its allocation must respect")

    @field_validator("budget")
    @classmethod
    def _budget(cls, value):
        if value is not None:
            parse_budget(value)
        return value

    def to_yaml(self) -> str:
        """The resolved recipe, every default written out; loads back equal."""
        content = self.model_dump(exclude={"name", "stages"})
        content["stages"] = [{s.name: _given(s)} for s in self.stages]
        return f"# resolved recipe {self.name}\n" + yaml.safe_dump(content, sort_keys=False)


def _given(stage: Stage) -> dict:
    """Options of a stage written out, without those that have no effect beside the others."""
    unused = stage.unused_options()
    return {name: value for name, value in stage.model_dump().items() if name not in unused and value is not None}
