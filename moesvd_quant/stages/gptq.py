"""Stage `gptq`: experts (dense or factorized) and other linear layers in 1 to 8 bits."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from ..quantize.registry import CODECS, Storage
from ..recipe.effort import Effort, judged
from ..recipe.stage import Form, Stage

if TYPE_CHECKING:
    from torch import nn

    from ..planning.context import Context, Plan
    from ..quantize.codec import Codecs


BEST = "best"  # in place of a format


def _formats(name: str) -> list[str]:
    """What the option `format` allows."""
    return list(CODECS) if name == BEST else [name]


class Gptq(Stage):
    name: ClassVar[str] = "gptq"
    takes: ClassVar[Form] = Form.CHANGED
    leaves: ClassVar[Form] = Form.PACKED
    budget_option: ClassVar[str | None] = "bits"

    format: str = Field(
        "grid",
        description="how weights are stored; grid: GPTQ's grids of groups; trellis: trellis codes, which lose half as "
        "much in the same bytes; best: whichever serves each matrix best",
    )
    bits: int | float | None = Field(
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
    error_aware: bool = Field(
        False, description="fit experts to the original's outputs on the inputs that compressed layers give them"
    )

    @field_validator("format")
    @classmethod
    def _format(cls, value):
        if value not in CODECS and value != BEST:
            raise ValueError(f"{value!r} is no known format ({', '.join([*CODECS, BEST])})")
        return value

    @field_validator("bits")
    @classmethod
    def _bits(cls, value, info):
        name = info.data.get("format")
        if value is not None and name is not None:
            rates = sorted({rate for known in _formats(name) for rate in CODECS[known].rates})
            if value not in rates:
                named = ", ".join(f"{rate:g}" for rate in rates)
                raise ValueError(f"{value} is none of the {named} bits of format {name}")
        return value

    @model_validator(mode="after")
    def _rounds_blindly(self):
        if self.rtn and self.error_aware:
            raise ValueError("error_aware: not with rtn, which looks at no inputs")
        if self.rtn and self.format != "grid":
            raise ValueError(f"rtn: rounds to grids; leave out format {self.format}")
        return self

    def unused_options(self) -> dict[str, str]:
        grids = self.format in ("grid", BEST)
        return {} if grids else {"group_size": "format: grid", "sym": "format: grid"}

    def calibration_walks(self) -> int:
        return 2 * self.error_aware

    def effort(self, shape: tuple[int, int]) -> Effort:
        """Factors, which a budget may have made of matrices, are coded up to three times, and are fewer weights."""
        errors = judged(shape, 4 if self.error_aware else 1)
        return errors._replace(factors=2 * shape[1] ** 3 / 3, coded=1.5 if self.needs_budget() else 1.0)

    def needs_sensitivity(self) -> bool:
        return self.needs_budget()

    @field_validator("group_size")
    @classmethod
    def _group_size(cls, value):
        if value != "auto" and (value <= 0 or value % 8):
            raise ValueError(f"{value} is not a positive multiple of 8")
        return value

    def label(self) -> str:
        name = self.name if self.format in ("grid", BEST) else self.format
        return f"{'rtn' if self.rtn else name}{self.bits or ''}{'-aware' if self.error_aware else ''}"

    def codec(self) -> "Codecs":
        from ..quantize.codec import Codecs

        return Codecs({name: CODECS[name].make(self) for name in _formats(self.format)})

    def storages(self) -> list[Storage]:
        return [
            Storage(rate, name)
            for name in _formats(self.format)
            for rate in CODECS[name].rates
            if self.bits in (None, rate)
        ]

    def plan(self, context: "Context") -> "Plan":
        from .gptq_work import plan

        return plan(context, self)

    def run_layer(self, context: "Context", index: int, layer: "nn.Module", statistics: dict, plan: "Plan") -> dict:
        from .gptq_work import run_layer

        return run_layer(context, self, index, layer, statistics, plan)

    def run_outer(self, context: "Context", plan: "Plan") -> dict:
        from .gptq_work import run_outer

        return run_outer(context, self, plan)
