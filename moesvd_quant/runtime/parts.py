"""What a layout says of a model. A copy lies in every checkpoint.

The layout (`config.moesvd`) says for each experts module and projection which tensors make up its weights:

    W[e] = dense[d(e)] + sum_t left_t[l_t(e)] @ right_t[r_t(e)]

A projection is a list of parts. A part holds one bank of dense matrices, or a bank of left and one of right factors of
a single rank, for the experts it names. Experts that no part names have weight zero. Gate and up may be one projection,
`gate_up`, whose rows are those of gate and then those of up: they then share their right factors.

A dense part may be pruned along the intermediate dimension: it then has `rows` of gate and up, or `columns` of down,
only for the `channels` of its module. Where up and down also say `dynamic`, each token uses just that many of them.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from .formats import FLOAT, Format, format_from
from .native_experts import form_of
from .routers import Sources

JOINT = "gate_up"  # gate and up as one projection
FORMAT = 3  # of layouts


@dataclass
class Bank:
    """A stack of matrices: its shape (count, rows, columns), how they are stored, and which one each expert uses."""

    shape: tuple[int, int, int]
    form: Format
    rows: list[int]


@dataclass
class _Part:
    """A summand of the weights of the experts it names. `chain`: its banks, as an input meets them.

    formats: how its banks are stored; banks that are not named are floating point.
    """

    chain: ClassVar[tuple[str, ...]]

    experts: list[int]
    formats: dict[str, Format] = field(default_factory=dict, kw_only=True)

    def sizes(self, out_features: int, in_features: int) -> dict[str, tuple[int, int]]:
        """(rows, columns) of a matrix of each bank, for a projection (out, in)."""
        raise NotImplementedError

    def users(self, bank: str) -> list[int]:
        """Which matrix of a bank each expert uses."""
        return getattr(self, bank)

    def form(self, bank: str) -> Format:
        return self.formats.get(bank, FLOAT)

    def banks(self, out_features: int, in_features: int) -> dict[str, Bank]:
        """The part's banks for a projection (out, in)."""
        sizes = self.sizes(out_features, in_features)
        return {b: Bank((max(self.users(b)) + 1, *size), self.form(b), self.users(b)) for b, size in sizes.items()}

    def take_rows_from(self, other: "Part") -> None:
        """Each expert uses the matrices that it uses in the same part of an earlier checkpoint."""
        if self.chain == other.chain and self.experts == other.experts:
            for bank in self.chain:
                setattr(self, bank, list(other.users(bank)))

    @property
    def packed(self) -> bool:
        """Whether any bank is quantized."""
        return any(form.packed for form in self.formats.values())

    def to_dict(self) -> dict[str, Any]:
        """As it stands in config.json; `part_from` is the inverse."""
        numbers = ("rank", "rows", "columns", "dynamic")
        said = {name: getattr(self, name) for name in numbers if getattr(self, name) is not None}
        formats = {bank: form.to_dict() for bank, form in self.formats.items()}
        return {"experts": self.experts, **{bank: self.users(bank) for bank in self.chain}, **said, "formats": formats}


@dataclass
class DensePart(_Part):
    """A dense matrix for each expert, or for several: dense[i] is the matrix of expert experts[i]."""

    chain: ClassVar[tuple[str, ...]] = ("dense",)
    rank: ClassVar[None] = None

    dense: list[int]
    rows: int | None = None
    columns: int | None = None
    dynamic: int | None = None

    def sizes(self, out_features, in_features):
        return {"dense": (self.rows or out_features, self.columns or in_features)}


@dataclass
class FactorPart(_Part):
    """A left and a right factor of one rank for each expert, or for several."""

    chain: ClassVar[tuple[str, ...]] = ("right", "left")
    rows: ClassVar[None] = None
    columns: ClassVar[None] = None
    dynamic: ClassVar[None] = None

    rank: int
    left: list[int]
    right: list[int]

    def sizes(self, out_features, in_features):
        return {"left": (out_features, self.rank), "right": (self.rank, in_features)}


Part = DensePart | FactorPart
Projections = dict[str, list[Part]]


@dataclass
class LinearLayout:
    """How a linear's weight is stored, and the rank of a float low-rank term beside it."""

    form: Format
    rank: int = 0

    def to_dict(self) -> dict[str, Any]:
        return self.form.to_dict() | ({"rank": self.rank} if self.rank else {})


@dataclass
class Layout:
    """Which tensors make up which weights, by path.

    sources: from which original experts those of a module come, where they are not the same ones in the same order.
    source_bytes: of the original's tensors on disk.
    """

    native_type: str
    experts: dict[str, Projections] = field(default_factory=dict)
    linears: dict[str, LinearLayout] = field(default_factory=dict)
    sources: dict[str, Sources] = field(default_factory=dict)
    source_bytes: int | None = None

    def parts(self) -> list[Part]:
        """All parts of all experts."""
        return [part for projections in self.experts.values() for parts in projections.values() for part in parts]

    @property
    def packed(self) -> bool:
        """Whether anything is quantized."""
        return bool(self.linears) or any(part.packed for part in self.parts())

    def to_dict(self) -> dict[str, Any]:
        """As it stands in config.json; `layout_from` is the inverse."""
        return {
            "format": FORMAT,
            "native_type": self.native_type,
            "experts": {path: projections_to(projections) for path, projections in self.experts.items()},
            "linears": {path: linear.to_dict() for path, linear in self.linears.items()},
            **({"sources": self.sources} if self.sources else {}),
            **({"source_bytes": self.source_bytes} if self.source_bytes else {}),
        }


def projections_to(projections: Projections) -> dict[str, list[dict]]:
    """The layout of an experts module as it stands in config.json."""
    return {name: [part.to_dict() for part in parts] for name, parts in projections.items()}


def projections_from(content: dict) -> Projections:
    """The inverse of `projections_to`."""
    return {name: [part_from(part) for part in parts] for name, parts in content.items()}


def part_from(content: dict) -> Part:
    """A part of a layout in config.json."""
    formats = {bank: format_from(entry) for bank, entry in content["formats"].items()}
    values = {key: value for key, value in content.items() if key != "formats"}
    return (FactorPart if "rank" in content else DensePart)(**values, formats=formats)


def linear_from(content: dict) -> LinearLayout:
    """A linear of a layout in config.json."""
    rank = content.get("rank", 0)
    return LinearLayout(format_from({key: value for key, value in content.items() if key != "rank"}), rank)


def layout_from(content: Any) -> Layout:
    """The layout in a config.json. ValueError where it is damaged, or of another version."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else content
        raise ValueError(f"config.json: moesvd.format is {found!r}, this version reads {FORMAT}")
    try:
        experts = {path: projections_from(projections) for path, projections in content["experts"].items()}
        linears = {path: linear_from(linear) for path, linear in content["linears"].items()}
        sources = {
            path: [list(map(int, group)) for group in found] for path, found in content.get("sources", {}).items()
        }
        return Layout(content["native_type"], experts, linears, sources, content.get("source_bytes"))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"config.json: the layout under `moesvd` is damaged: {error!r}; copy it again") from error


def channel_tensors(projections: Projections) -> dict:
    """int32 tensors of a module with pruned dense parts, {name: length}: the channels they keep, and, as the bits of
    fp32, what a token's choice among these starts from and how it weighs their activations."""
    pruned = [part for parts in projections.values() for part in parts if part.rows or part.columns]
    if not pruned:
        return {}
    names = ["channels"]
    if any(part.dynamic is not None for part in pruned):
        names += ["channel_prior", "channel_weight"]
    return dict.fromkeys(names, pruned[0].rows or pruned[0].columns)


def projection_shapes(experts: nn.Module) -> dict:
    """(out, in) of each projection of a native experts module: {"gate", "up", "down"} or without gate."""
    form = form_of(experts)
    if form is None:
        raise ValueError(
            f"{type(experts).__name__} is no fused experts module; a library that unfuses experts (gptqmodel does) "
            "was at work in this process: open the checkpoint in a fresh one"
        )
    return {name: tuple(weight.shape[1:]) for name, weight in form.weights(experts).items()}


def joined(shapes: dict) -> dict:
    """(out, in) of each projection where gate and up, if there are both, are one."""
    if "gate" not in shapes:
        return shapes
    (gate, inputs), (up, _) = shapes["gate"], shapes["up"]
    return {JOINT: (gate + up, inputs), "down": shapes["down"]}


def separate(pairs: dict) -> dict:
    """Outputs (n, out) of gate and of up, from those of each projection before down."""
    return dict(zip(("gate", "up"), pairs[JOINT].chunk(2, -1))) if JOINT in pairs else pairs
