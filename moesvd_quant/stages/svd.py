"""Stage `svd`: every expert matrix becomes low-rank factors, or stays dense where that is cheaper."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from ..recipe.stage import Form, Stage, check_ratio

if TYPE_CHECKING:
    from torch import nn

    from ..planning.context import Context, Plan

SHARE_MARKS = {"refit": "", "equation_6": "eq6", "equation_8": "eq8", "algorithm_3": "alg3", "none": "own"}


class Svd(Stage):
    name: ClassVar[str] = "svd"
    takes: ClassVar[Form] = Form.FEWER
    leaves: ClassVar[Form] = Form.CHANGED
    budget_option: ClassVar[str | None] = "ratio"

    method: Literal["global", "svd_llm", "asvd", "plain", "moe_svd"] = Field(
        "global",
        description="global: ranks by one threshold over the model. svd_llm, asvd, plain: the same share of the rank "
        "for every matrix, with SVD-LLM's whitening, ASVD's scaling, or no statistics. moe_svd: the MoE-SVD paper: "
        "sensitive layers kept, V shared, U trimmed",
    )
    ratio: float | None = Field(
        None, description="fraction of routed-expert parameters removed, between 0 and 1; left open: the budget decides"
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

    def unused_options(self) -> dict[str, str]:
        """Options of other methods, {name: what they need}."""
        paper, factors = self.method == "moe_svd", self.select if self.select not in ("owl", "uniform") else ""
        needs = {
            "update": (self.method == "svd_llm", "method: svd_llm"),
            "error_aware": (self.method == "global", "method: global"),
            "alpha": (self.method == "asvd", "method: asvd"),
            "principal_rank": ("p" in factors, "p in select"),
            "outlier": ("a" in factors, "a in select"),
            "keep_u": (self.trim_u is None, "trim_u left out"),
        }
        trims = self.share not in ("none", "equation_6")
        for name in ("keep_u", "trim_u"):
            met, need = needs.get(name, (True, ""))
            needs[name] = (met and trims, need if trims else "a share that trims U")
        needs["groups"] = (self.share != "none", "a share of V")
        for name in ("select", "share", "groups", "keep_u", "trim_u", "principal_rank", "outlier"):
            met, need = needs.get(name, (True, ""))
            needs[name] = (met and paper, need if paper else "method: moe_svd")
        return {name: need for name, (met, need) in needs.items() if not met}

    @model_validator(mode="after")
    def _has_ratio(self):
        if self.method != "global" and self.ratio is None:
            raise ValueError("ratio: is required (fraction of routed-expert parameters removed, between 0 and 1)")
        return self

    def calibration_walks(self) -> int:
        return 2 if self.error_aware else int(self.update)

    def needs_sensitivity(self) -> bool:
        return self.method == "global"

    def label(self) -> str:
        label = self._method_label()
        ratio = "" if self.ratio is None else f"{round(self.ratio * 100)}"
        label = f"{label}-{ratio}" if label[-1].isdigit() else label + ratio
        return f"{label}-aware" if self.error_aware else label

    def _method_label(self) -> str:
        if self.method != "moe_svd":
            label = {"global": "svd", "svd_llm": "svd-llm", "plain": "svd-plain", "asvd": "asvd"}[self.method]
            return f"{label}-update" if self.update else label
        marks = {
            self.select: self.select != "fpa",
            SHARE_MARKS[self.share]: self.share != "refit",
            f"g{self.groups}": self.groups > 1,
            f"trim{self.trim_u}": self.trim_u is not None,
            f"keep{self.keep_u}": self.keep_u != 2,
        }
        return "-".join(["moe-svd-paper", *(mark for mark, is_set in marks.items() if is_set)])

    def plan(self, context: "Context") -> "Plan":
        from .svd_work import plan

        return plan(context, self)

    def run_layer(self, context: "Context", index: int, layer: "nn.Module", statistics: dict, plan: "Plan") -> dict:
        from .svd_work import run_layer

        return run_layer(context, self, index, layer, statistics, plan)
