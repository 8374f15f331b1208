"""Stage `svd`: every expert matrix becomes low-rank factors, or stays dense where that is cheaper."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from ..recipe.effort import Effort, decomposed
from ..recipe.stage import STEP, Form, Stage, check_ratio

if TYPE_CHECKING:
    from torch import nn

    from ..planning.context import Context, Plan

SHARE_MARKS = {"refit": "", "equation_6": "eq6", "equation_8": "eq8", "algorithm_3": "alg3", "none": "own"}


LABELS = {"global": "svd", "svd_llm": "svd-llm", "plain": "svd-plain", "asvd": "asvd", "fwsvd": "fwsvd"}


class Svd(Stage):
    name: ClassVar[str] = "svd"
    takes: ClassVar[Form] = Form.FEWER
    leaves: ClassVar[Form] = Form.CHANGED
    budget_option: ClassVar[str | None] = "ratio"

    method: Literal["global", "svd_llm", "asvd", "fwsvd", "plain", "moe_svd"] = Field(
        "global",
        description="global: ranks by one threshold over the model. svd_llm, asvd, fwsvd, plain: ranks by `ranks`; "
        "with SVD-LLM's whitening, ASVD's scaling, FWSVD's Fisher information, or no statistics. moe_svd: the MoE-SVD "
        "paper: sensitive layers kept, V shared, U trimmed",
    )
    ratio: float | None = Field(
        None, description="fraction of parameters removed, see ratio_of, between 0 and 1; open: the budget decides"
    )
    ratio_of: Literal["experts", "model"] = Field(
        "experts", description="what ratio is a share of: routed-expert parameters, or all parameters, as papers count"
    )
    ranks: Literal["uniform", "owl", "strs", "importance"] = Field(
        "uniform",
        description="svd_llm, asvd, fwsvd, plain: uniform: the same share of the rank for every matrix; owl: more in "
        "layers with many outliers (OWL); strs, of asvd: by the loss that each truncation alone causes (ASVD); "
        "importance: in each layer by what its output loses without the expert (MoE-I\u00b2)",
    )
    power: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5, description="ranks: importance: ranks are proportional to this power of an expert's importance"
    )
    update: bool = Field(
        False,
        description="svd_llm: left factors refitted to the inputs that the compressed layers before give (SVD-LLM)",
    )
    error_aware: bool = Field(
        False, description="global: factors fitted to the original's outputs on the inputs that compressed layers give"
    )
    alpha: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5, description="asvd: power of the mean |activation| that scales"
    )
    select: Literal["fpa", "fp", "fa", "pa", "f", "p", "a", "owl", "uniform"] = Field(
        "fpa", description="moe_svd: what keeps a layer: factors of eq. 4 (Table 5), OWL's score, or nothing (Table 4)"
    )
    layers: list[int] | None = Field(
        None, description="moe_svd: the layers to decompose, from 0, in place of a choice by score (Table 10)"
    )
    rank: Annotated[int, Field(gt=0, multiple_of=STEP)] | None = Field(
        None, description="moe_svd: rank of all factors of these layers, in place of a ratio"
    )
    share: Literal["refit", "equation_6", "equation_8", "algorithm_3", "none"] = Field(
        "refit",
        description="moe_svd: what the experts of a decomposed layer share. refit: one V, few U fitted to it. "
        "equation_6: one V, own U. equation_8: one V, sums of U. algorithm_3: the paper's code. none: own factors",
    )
    groups: Annotated[int, Field(ge=1)] = Field(1, description="moe_svd: groups of neighbouring experts; one V each")
    keep_u: Annotated[int, Field(ge=1)] = Field(2, description="moe_svd: left factors kept per group (k of eq. 7)")
    trim_u: Annotated[int, Field(ge=0)] | None = Field(
        None, description="moe_svd: left factors trimmed per group, in place of keep_u (Table 6); 0 keeps all"
    )
    principal_rank: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.01, description="moe_svd: a singular value counts above this share of the largest (Algorithm 1)"
    )
    outlier: Annotated[float, Field(gt=0)] = Field(
        2.0, description="moe_svd: an activation is an outlier above this multiple of the mean (eq. 10)"
    )

    @field_validator("ratio")
    @classmethod
    def _ratio(cls, value):
        return None if value is None else check_ratio(value)

    @field_validator("layers")
    @classmethod
    def _layers(cls, value):
        if value is not None and (not value or min(value) < 0 or len(set(value)) < len(value)):
            raise ValueError("give the numbers of some layers, from 0, each once")
        return value

    def unused_options(self) -> dict[str, str]:
        """Options of other methods, {name: what they need}."""
        factors = self.select if self.select not in ("owl", "uniform") else ""
        scored, trims = self.layers is None, self.share not in ("none", "equation_6")
        needs = {
            "ratio_of": (self.ratio is not None, "a ratio"),
            "update": (self.method == "svd_llm", "method: svd_llm"),
            "error_aware": (self.method == "global", "method: global"),
            "ranks": (self.method in LABELS and self.method != "global", "method: svd_llm, asvd, fwsvd or plain"),
            "alpha": (self.method == "asvd", "method: asvd"),
            "power": (self.ranks == "importance", "ranks: importance"),
        }
        own = {
            "select": (scored, "layers left out"),
            "layers": (True, ""),
            "rank": (not scored, "layers"),
            "share": (True, ""),
            "groups": (self.share != "none", "a share of V"),
            "keep_u": (trims and self.trim_u is None, "trim_u left out" if trims else "a share that trims U"),
            "trim_u": (trims, "a share that trims U"),
            "principal_rank": (scored and "p" in factors, "p in select" if scored else "layers left out"),
            "outlier": (scored and "a" in factors, "a in select" if scored else "layers left out"),
        }
        needs |= own if self.method == "moe_svd" else dict.fromkeys(own, (False, "method: moe_svd"))
        return {name: need for name, (met, need) in needs.items() if not met}

    @model_validator(mode="after")
    def _ratio_or_rank(self):
        if self.ratio is not None and self.rank is not None:
            raise ValueError("ratio: follows from layers and rank; remove ratio, or rank")
        if self.ranks == "strs" and self.method != "asvd":
            raise ValueError("ranks: strs is ASVD's search; use method: asvd, or ranks: owl")
        return self

    def needs_budget(self) -> bool:
        return self.ratio is None and self.rank is None

    def calibration_walks(self) -> int:
        return 2 if self.error_aware else int(self.update)

    def effort(self, shape: tuple[int, int]) -> Effort:
        return decomposed(shape)

    def needs_sensitivity(self) -> bool:
        return self.method == "global"

    def label(self) -> str:
        label = self._method_label()
        if self.ratio is not None:
            label += f"{'-' if label[-1].isdigit() else ''}{round(self.ratio * 100)}"
            label += "-of-model" if self.ratio_of == "model" else ""
        return f"{label}-aware" if self.error_aware else label

    def _method_label(self) -> str:
        if self.method != "moe_svd":
            marks = {self.ranks: self.ranks != "uniform", "update": self.update}
            return "-".join([LABELS[self.method], *(mark for mark, is_set in marks.items() if is_set)])
        marks = {
            self.select: self.select != "fpa",
            f"layers{len(self.layers or ())}": self.layers is not None,
            f"r{self.rank}": self.rank is not None,
            SHARE_MARKS[self.share]: self.share != "refit",
            f"g{self.groups}": self.groups > 1,
            f"trim{self.trim_u}": self.trim_u is not None,
            f"keep{self.keep_u}": self.keep_u != 2,
        }
        return "-".join(["moe-svd-paper", *(mark for mark, is_set in marks.items() if is_set)])

    def plan(self, context: "Context") -> "Plan":
        from .svd_work import plan

        return plan(context, self)

    def prepare(self, context: "Context", plan: "Plan", folder: Path) -> "Plan":
        from .svd_work import prepare

        return prepare(context, self, plan)

    def run_layer(self, context: "Context", index: int, layer: "nn.Module", statistics: dict, plan: "Plan") -> dict:
        from .svd_work import run_layer

        return run_layer(context, self, index, layer, statistics, plan)
