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

    def idle(self) -> dict[str, str]:
        """Options that mean nothing beside the others, and what they need."""
        return {}

    def walks(self) -> int:
        """Models that the stage takes the calibration text through while it works on their layers."""
        return 0

    def weighs(self) -> bool:
        """Whether the plan asks what an error in each group of experts does to the model's output."""
        return False

    def in_order(self) -> bool:
        """Whether a layer depends on what was made of those before it: a run that goes on makes them again."""
        return self.walks() > 0


class SvdOptions(StageOptions):
    method: Literal["global", "uniform", "asvd", "plain", "paper"] = Field(
        "global",
        description="global: ranks by one threshold over the model; uniform: one rank share (SVD-LLM per "
        "expert); asvd, plain: the same share, ASVD's scaling or no statistics at all; paper: MoE-SVD, sensitive "
        "layers kept, V shared, U trimmed",
    )
    ratio: float | None = Field(
        None, description="fraction of routed-expert parameters removed, between 0 and 1; left open: the budget decides"
    )
    update: bool = Field(
        False,
        description="uniform: left factors refitted to the inputs that the compressed layers before give (SVD-LLM)",
    )
    error_aware: bool = Field(
        False, description="global: factors fitted to the original's outputs on the inputs that compressed layers give"
    )
    alpha: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5, description="asvd: power of the mean |activation| that scales"
    )
    select: Literal["fpa", "fp", "fa", "pa", "f", "p", "a", "owl", "uniform"] = Field(
        "fpa", description="paper: what keeps a layer: factors of eq. 4 (Table 5), OWL's score, or nothing (Table 4)"
    )
    shared_v: bool = Field(True, description="paper: one right factor for all experts of a group; false: own factors")
    groups: Annotated[int, Field(ge=1)] = Field(1, description="paper: groups of neighbouring experts, each with its V")
    keep_u: Annotated[int, Field(ge=1)] = Field(2, description="paper: left factors kept per group (k of eq. 7)")
    trim_u: Annotated[int, Field(ge=0)] | None = Field(
        None, description="paper: left factors trimmed per group, in place of keep_u (Table 6); 0 keeps all"
    )
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

    def idle(self) -> dict[str, str]:
        """Options that mean nothing beside the others, and what they need."""
        paper, factors = self.method == "paper", self.select if self.select not in ("owl", "uniform") else ""
        needs = {
            "update": (self.method == "uniform", "method: uniform"),
            "error_aware": (self.method == "global", "method: global"),
            "alpha": (self.method == "asvd", "method: asvd"),
            "principal_rank": ("p" in factors, "p in select"),
            "outlier": ("a" in factors, "a in select"),
            "keep_u": (self.trim_u is None, "trim_u left out"),
        }
        for name in ("groups", "keep_u", "trim_u", "literal"):
            met, need = needs.get(name, (True, ""))
            needs[name] = (met and self.shared_v, need if self.shared_v else "shared_v: true")
        for name in ("select", "shared_v", "groups", "keep_u", "trim_u", "principal_rank", "outlier", "literal"):
            met, need = needs.get(name, (True, ""))
            needs[name] = (met and paper, need if paper else "method: paper")
        return {name: need for name, (met, need) in needs.items() if not met}

    @model_validator(mode="after")
    def _no_idle(self):
        given: dict[str, list[str]] = {}
        for name, need in self.idle().items():
            if name in self.model_fields_set:
                given.setdefault(need, []).append(name)
        if given:
            raise ValueError(
                "; ".join(f"{', '.join(sorted(names))}: only with {need}" for need, names in given.items())
            )
        if self.method != "global" and self.ratio is None:
            raise ValueError("ratio: is required (fraction of routed-expert parameters removed, between 0 and 1)")
        return self

    def is_open(self) -> bool:
        """Whether a budget has to decide something."""
        return self.ratio is None

    def walks(self) -> int:
        return 2 if self.error_aware else int(self.update)

    def weighs(self) -> bool:
        return self.method == "global"

    def shares(self, experts: int) -> bool:
        """Whether so many experts have a right factor in common; a shared expert, alone, has its factors to itself."""
        return self.method == "paper" and self.shared_v and experts > 1

    def kept(self, group: int) -> int:
        """Left factors that a group of so many experts keeps; ValueError where it has not as many."""
        kept = self.keep_u if self.trim_u is None else group - self.trim_u
        if not 1 <= kept <= group:
            given = f"keep_u {self.keep_u}" if self.trim_u is None else f"trim_u {self.trim_u}"
            raise ValueError(f"{given}: a group has {group} experts; give {self._range(group)}")
        return kept

    def _range(self, group: int) -> str:
        return f"1 to {group}" if self.trim_u is None else f"0 to {group - 1}"


class D2Options(StageOptions):
    ratio: float = Field(description="fraction of routed-expert parameters removed, between 0 and 1")
    merge: Literal["fisher", "frequency", "mean"] = Field("fisher", description="what weights the experts in the base")
    shared_v: bool = Field(False, description="one right factor for the deltas of all experts")
    static: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="share of the base's channels left out")
    dynamic: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of the base's channels that each token leaves out by its own choice; they are stored"
    )

    @field_validator("ratio")
    @classmethod
    def _ratio(cls, value):
        return check_ratio(value)

    @model_validator(mode="after")
    def _something_left(self):
        if self.static + self.dynamic >= 1:
            raise ValueError(f"static {self.static} and dynamic {self.dynamic}: leave nothing of the base; lower them")
        return self


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
    error_aware: bool = Field(
        False, description="fit experts to the original's outputs on the inputs that compressed layers give them"
    )

    @model_validator(mode="after")
    def _rounds_blindly(self):
        if self.rtn and self.error_aware:
            raise ValueError("error_aware: not with rtn, which looks at no inputs")
        return self

    def walks(self) -> int:
        return 2 * self.error_aware

    def weighs(self) -> bool:
        return self.is_open()

    def is_open(self) -> bool:
        """Whether a budget has to decide something."""
        return self.bits is None

    @field_validator("group_size")
    @classmethod
    def _group_size(cls, value):
        if value != "auto" and (value <= 0 or value % 8):
            raise ValueError(f"{value} is not a positive multiple of 8")
        return value


class LoraOptions(StageOptions):
    train: Literal["adapters", "factors", "router", "scales"] = Field(
        "adapters",
        description="adapters: LoRA, merged afterwards, or kept as a low-rank term where weights are packed; factors: "
        "the 16-bit factors themselves; router: the routers alone; scales: after gptq, the scales of what is packed, "
        "norms, and routers, in the bytes they have",
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
    lr: Annotated[float, Field(gt=0)] = Field(5e-4, description="peak of the cosine schedule; scales take 5e-3")
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
