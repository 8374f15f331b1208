"""What each stage can be told. Read without torch, so that a recipe is checked in milliseconds."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


def check_ratio(value: float) -> float:
    if not 0 < value < 1:
        raise ValueError(f"{value} is not between 0 and 1 (fraction of routed-expert parameters removed)")
    return value


class StageOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    def is_open(self) -> bool:
        """Whether a budget has to decide something."""
        return False


class SvdOptions(StageOptions):
    method: Literal["global", "uniform", "paper"] = Field(
        "global",
        description="global: ranks by one threshold over the model; uniform: one rank share (SVD-LLM per "
        "expert); paper: MoE-SVD, sensitive layers kept, V shared, U trimmed",
    )
    ratio: float | None = Field(
        None, description="fraction of routed-expert parameters removed, between 0 and 1; left open: the budget decides"
    )
    keep_u: Annotated[int, Field(ge=1)] = Field(2, description="paper: left factors kept per layer (k of eq. 7)")
    principal_rank: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.01, description="paper: a singular value counts above this share of the largest (Algorithm 1)"
    )
    outlier: Annotated[float, Field(gt=0)] = Field(
        2.0, description="paper: an activation is an outlier above this multiple of the mean (eq. 10)"
    )
    literal: bool = Field(False, description="paper: Algorithm 3 by the letter, without refit")

    @field_validator("ratio")
    @classmethod
    def _ratio(cls, value):
        return None if value is None else check_ratio(value)

    @model_validator(mode="after")
    def _paper_only(self):
        given = self.model_fields_set & {"keep_u", "principal_rank", "outlier", "literal"}
        if given and self.method != "paper":
            raise ValueError(f"{', '.join(sorted(given))}: only with method: paper")
        if self.method != "global" and self.ratio is None:
            raise ValueError("ratio: is required (fraction of routed-expert parameters removed, between 0 and 1)")
        return self

    def is_open(self) -> bool:
        """Whether a budget has to decide something."""
        return self.ratio is None


class D2Options(StageOptions):
    ratio: float = Field(description="fraction of routed-expert parameters removed, between 0 and 1")
    merge: Literal["fisher", "frequency", "mean"] = Field("fisher", description="what weights the experts in the base")
    shared_v: bool = Field(False, description="one right factor for the deltas of all experts")

    @field_validator("ratio")
    @classmethod
    def _ratio(cls, value):
        return check_ratio(value)


class GptqOptions(StageOptions):
    bits: Literal[2, 3, 4, 8] | None = Field(
        None, description="bits per weight; left open: the budget decides for each expert, other linears get 4"
    )
    group_size: Literal["auto"] | int = Field(
        "auto", description="input features per scale; auto: the largest of 128, 64, 32 that divides"
    )
    sym: bool = Field(False, description="symmetric grid: no zeros are stored (needed by most kernels)")
    damp: Annotated[float, Field(gt=0, lt=1)] = Field(0.05, description="share of the mean added to the Hessian")
    attention: bool = Field(True, description="attention, shared-expert and dense-layer linears as well")
    lm_head: bool = Field(False, description="the output head as well")
    rtn: bool = Field(False, description="round to nearest instead of GPTQ: the baseline")

    def is_open(self) -> bool:
        """Whether a budget has to decide something."""
        return self.bits is None

    @field_validator("group_size")
    @classmethod
    def _group_size(cls, value):
        if value != "auto" and (value <= 0 or value % 8):
            raise ValueError(f"{value} is not a positive multiple of 8")
        return value
